"""Turn a checkpoint into a folder that Transformers loads."""

import re
from typing import Literal

from moe_mamba.convert.to_hf import export
from moe_mamba.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(
    checkpoint: str,
    output: str,
    format: Literal["auto", "moe_mamba", "native"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    overwrite: bool = False,
    scoring_only: bool = False,
) -> None:
    """Write safetensors, config, fast tokenizer, generation config and a model card; nothing is whole in memory.

    AutoModelForCausalLM and AutoTokenizer then load the folder. Where a class of Transformers' own holds the model
    exactly (Mamba, Llama, Mistral, Mixtral, Jamba), it needs no remote code.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        output: the folder to write; it appears when it is whole.
        format: native is a class of Transformers' own; moe_mamba our own class, its code beside the weights; auto is
            native where that is exact.
        dtype: of the weights; by default what the run computed in. With 16 bits, what training keeps in fp32 stays so.
        max_shard_size: of a file of weights, such as 500MB or 5GB.
        tokenizer: gpt2, bytes, a folder or a .model file, where the run's own tokenizer folder is gone.
        overwrite: replace a converted model that is at output.
        scoring_only: export a model whose experts choose tokens, which scores texts and cannot generate.
    """
    export(checkpoint, output, format, dtype, parse_size(max_shard_size), overwrite, scoring_only, tokenizer)


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB`` or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.strip().upper())
    if match is None or match[2] not in UNITS or (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise UserError(f"--max_shard_size={text} is not a size: give one such as 500MB or 5GB")
    return size
