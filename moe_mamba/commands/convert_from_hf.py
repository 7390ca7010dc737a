"""Bring a model in: a Hugging Face folder becomes a run's folder."""

from pathlib import Path

from moe_mamba.convert.from_hf import before_texts, import_folder
from moe_mamba.convert.starting_point import how_to_train
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.run.folder import RunFolder


def main(input: str, output: str, tokenizer: str | None = None, overwrite: bool = False) -> None:
    """Read a folder of MoEMamba-, Mamba-, Jamba-, Mixtral-, Mistral- or LlamaForCausalLM.

    Or a state-spaces Mamba (pytorch_model.bin goes through torch's restricted reader, which builds only tensors). No
    code of the folder is run, and no key of config.json that may change what the model computes is passed over. What is
    written can be trained on in any layout, generated from and evaluated.

    Args:
        input: the folder, with config.json, weights, and a tokenizer.
        output: the run's folder to write.
        tokenizer: gpt2, bytes, a SentencePiece .model file or a tokenizer's folder; where none is given, the input's.
        overwrite: replace a run's folder that is there, once the new one is whole.
    """
    format, config, step = import_folder(Path(input), Path(output), tokenizer, overwrite)
    before = before_texts(load_tokenizer(RunFolder(Path(output)).tokenizer))
    print(
        f"{input}: {format.architecture} as {config.model.pattern} x {config.model.repeat}, in {step}"
        + f"; {before} stands before every text, as in Transformers" * bool(before)
    )
    print(how_to_train(Path(output)))
