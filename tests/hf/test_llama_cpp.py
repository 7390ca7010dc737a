"""llama.cpp converts and runs what we export as ``MambaForCausalLM``, by the keys, names and shapes held here.

Read and run: llama.cpp at 0c1e57098, its ``conversion/mamba.py`` (``MambaModel``), ``conversion/base.py`` and
``gguf-py/gguf/tensor_mapping.py``; four layers with GPT-2's tokenizer, vocabularies of 50,264 and 50,257, tied and not,
gave the same 64 greedy tokens as Transformers, and logits within 7e-7. A vocabulary that is no multiple of 8 needs
``pad_vocab_size_multiple``. It takes only expand 2, and tokenizers that it knows by the hash of a text's ids: GPT-2's
is one, our own trained ones and bytes are not.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from moe_mamba.convert.to_hf import export
from moe_mamba.data.tokenizer import LibraryTokenizer
from tests.hf.checkpoints import make_run

LAYERS, VOCABULARY, D_MODEL, D_INNER, D_STATE, D_CONV, DT_RANK = 2, 261, 16, 32, 4, 3, 2
KEYS: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],  # get_model_architecture: picks MambaModel
    "model_type": "mamba",  # set_gguf_parameters: falcon_mamba would have norms inside the mixer
    "vocab_size": VOCABULARY,  # set_vocab, get_vocab_base: so many tokens, absent ones named [PADn]
    "pad_vocab_size_multiple": 1,  # set_vocab: rounds vocab_size up, to a multiple of 8 by default
    "num_hidden_layers": LAYERS,  # TextModel.__init__: block_count
    "hidden_size": D_MODEL,  # set_gguf_parameters, as what follows: embedding_length
    "intermediate_size": D_INNER,  # ssm_inner_size, which must be 2 x hidden_size
    "state_size": D_STATE,  # ssm_state_size
    "conv_kernel": D_CONV,  # ssm_conv_kernel
    "time_step_rank": DT_RANK,  # ssm_time_step_rank
    "layer_norm_epsilon": 2e-5,  # layer_norm_rms_eps
}
MIXER = {  # tensor_mapping.py: backbone.layers.{bid}.mixer.* -> blk.{bid}.ssm_*
    "in_proj.weight": [2 * D_INNER, D_MODEL],  # ssm_in: x above, z below
    "conv1d.weight": [D_INNER, 1, D_CONV],  # ssm_conv1d: modify_tensors squeezes the middle
    "conv1d.bias": [D_INNER],
    "x_proj.weight": [DT_RANK + 2 * D_STATE, D_INNER],  # ssm_x: dt, B, C
    "dt_proj.weight": [D_INNER, DT_RANK],  # ssm_dt
    "dt_proj.bias": [D_INNER],
    "A_log": [D_INNER, D_STATE],  # ssm_a: modify_tensors stores -exp of it
    "D": [D_INNER],  # ssm_d
    "out_proj.weight": [D_MODEL, D_INNER],  # ssm_out
}
TENSORS = {
    "backbone.embeddings.weight": [VOCABULARY, D_MODEL],  # token_embd
    "backbone.norm_f.weight": [D_MODEL],  # output_norm
    **{f"backbone.layers.{n}.norm.weight": [D_MODEL] for n in range(LAYERS)},  # attn_norm
    **{f"backbone.layers.{n}.mixer.{name}": shape for n in range(LAYERS) for name, shape in MIXER.items()},
}
HEAD = {"lm_head.weight": [VOCABULARY, D_MODEL]}  # output; without it the loader takes token_embd


def _like_gpt2() -> LibraryTokenizer:
    """Bytes and one merge, laid out as GPT-2's tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: place for place, name in enumerate([*letters, "Ġa", "<|endoftext|>"])}
    library = Library(models.BPE(vocab=vocabulary, merges=[("Ġ", "a")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return LibraryTokenizer(library.to_str(), "like GPT-2")


def _exported(folder: Path, tied: bool) -> Path:
    sizes = {"repeat": LAYERS, "d_model": D_MODEL, "d_state": D_STATE, "d_conv": D_CONV, "dt_rank": DT_RANK}
    keys = {"vocab_size": VOCABULARY, "norm_epsilon": 2e-5, "tied_head": tied}
    make_run(folder / "run", {"pattern": "M", **sizes, **keys}, tokenizer=_like_gpt2())
    assert export(folder / "run", folder / "out", format="native").name == "mamba"
    return folder / "out"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_have_the_names_and_shapes_that_it_maps(tmp_path: Path, tied: bool) -> None:
    folder = _exported(tmp_path, tied)
    with safe_open(folder / "model.safetensors", "pt") as file:  # index_tensors: model*.safetensors
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == TENSORS | ({} if tied else HEAD)


def test_the_configuration_has_the_keys_that_it_reads(tmp_path: Path) -> None:
    configuration = json.loads((_exported(tmp_path, True) / "config.json").read_text())
    assert {key: configuration[key] for key in KEYS} == KEYS
    others = {"d_model", "d_conv", "d_inner", "d_state", "dt_rank", "rms_norm_eps"}  # second names of the same
    counts = {"n_layers", "n_layer", "num_layers"}
    parts = {"text_config", "quantization_config"}  # would be read in their stead
    assert not configuration.keys() & (others | counts | parts)


def test_the_tokenizer_is_in_the_files_that_it_reads(tmp_path: Path) -> None:
    """``_set_vocab_gpt2`` where there is ``tokenizer.json``; ``SpecialVocab`` has merges and special tokens from it."""
    folder, tokenizer = _exported(tmp_path, True), _like_gpt2()
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["model"]["type"] == "BPE" and content["model"]["merges"] == [["Ġ", "a"]]
    assert max(content["model"]["vocab"].values()) < VOCABULARY
    assert not (folder / "tokenizer.model").exists()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.end_of_text
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)  # get_vocab_base_pre: without remote code
    text = "\n \n\n a 3 33 333 ça !? I've 'RE"
    assert loaded.encode(text) == tokenizer.encode(text), "known by its ids, so nothing may be added around them"
