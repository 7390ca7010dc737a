"""Folders that cannot be read end in one line, and nothing in them is run."""

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.convert.from_hf import import_folder
from moe_mamba.data.tokenizer import BytesTokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.hf.formats import FORMATS
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel

NORM = "backbone.layers.0.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Mamba of Transformers' layout."""
    folder = tmp_path / "in"
    folder.mkdir()
    keys: dict[str, Any] = {"pattern": "M", "repeat": 1, "d_model": 16, "d_state": 4, "vocab_size": 264}
    model = LanguageModel(ModelConfig(**keys), MoEConfig())
    initialize(model, 0)
    ours = model.state_dict()
    entries = FORMATS["mamba"].entries(model.config, MoEConfig())
    tensors = {entry.theirs: entry.view(ours[entry.ours]).contiguous() for entry in entries}
    save_file(tensors, folder / "model.safetensors")
    configuration = FORMATS["mamba"].configuration(model.config, MoEConfig())  # type: ignore[attr-defined]
    (folder / "config.json").write_text(json.dumps(configuration))
    BytesTokenizer().save(folder)
    return folder


def change(folder: Path, fix: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    fix(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(folder: Path, line: str, **keys: Any) -> None:
    """The import ends in one line, and leaves nothing behind."""
    output = folder.parent / "run"
    with pytest.raises(UserError, match=line) as error:
        import_folder(folder, output, **keys)
    assert "\n" not in str(error.value)
    assert not output.exists()
    assert not list(folder.parent.glob(".run*"))


def test_foreign_folders(folder: Path, tmp_path: Path) -> None:
    refused(
        tmp_path / "nothing",
        r"nothing has no config\.json, .*: give .*moe_mamba, mamba, llama, mistral, mixtral, jamba, state_spaces",
    )
    configure(folder, model_type="gpt2")
    refused(folder, r"model_type='gpt2' is not supported.*mamba")
    configure(folder, model_type="mamba", use_bias=True)
    refused(folder, r"use_bias=True cannot be read")
    for text in ("{", "[]", "\udcff"):
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        refused(folder, r"config\.json (cannot be read as JSON|is not a JSON object)")


def test_a_tensor_is_missing(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, rf"has no tensor {NORM}, which")


def test_a_tensor_too_many(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"adapter.weight": torch.ones(2), "other": torch.ones(2)}))
    refused(folder, r"has the tensor adapter\.weight \(and 1 more\), which")


def test_rotary_frequencies_of_a_model_without_attention_are_no_tensor_of_it(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"layers.0.rotary_emb.inv_freq": torch.ones(2)}))
    refused(folder, r"has the tensor layers\.0\.rotary_emb\.inv_freq, which the MambaForCausalLM")


def test_a_wrong_shape_or_kind(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(17)}))
    refused(folder, rf"{NORM} has shape \[17\], but config\.json says \[16\]")
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int8)}))
    refused(folder, rf"{NORM} is I8, but only F32, F16, BF16 are supported")


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.float16)])
def test_weights_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(16, dtype=dtype)
    weight[7] = value
    change(folder, lambda tensors: tensors.update({NORM: weight}))
    refused(folder, rf"^{folder}: {NORM} holds NaN or Inf: fetch the folder again, or give another$")


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for truncated in (whole[:-3], whole[:5], b"", b"<html>not found</html>"):
        path.write_bytes(truncated)
        refused(folder, r"model\.safetensors is truncated or not a safetensors file")
    path.unlink()
    refused(folder, "holds no supported weights")


def test_a_missing_shard_and_a_shard_without_its_tensor(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard in ("b.safetensors", "../in/a.safetensors", "a" * 300):
        index.write_text(json.dumps({"weight_map": {NORM: "a.safetensors", "x": shard}}))
        refused(folder, f"{shard[-20:]} is missing, but")
    index.write_text(json.dumps({"weight_map": {NORM: "a.safetensors", "x": "a.safetensors"}}))
    refused(folder, r"a\.safetensors has no tensor x, which")
    index.write_text("{}")
    refused(folder, "no weight_map")


class Evil:
    """Runs a command where it is unpickled as pickles are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_no_pickle_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({NORM: Evil()}, path)
    refused(folder, r"pytorch_model\.bin is truncated, or refused because it holds more than tensors")
    path.write_bytes(pickle.dumps(Evil()))
    refused(folder, r"pytorch_model\.bin is truncated, or refused")
    torch.save({NORM: torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    refused(folder, r"pytorch_model\.bin is truncated, or refused")
    for value in (1, torch.ones(16).to_sparse(), torch.ones(16, device="meta")):
        torch.save({NORM: value}, path)
        refused(folder, "is not a mapping of names to plain tensors")
    assert not Path("evil").exists()


def test_no_code_of_the_folder_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in ("__init__", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text("import os\nos.mkdir('evil')\n")
    auto = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    configure(folder, auto_map=auto)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.T"]}}))
    import_folder(folder, folder.parent / "run")
    assert not Path("evil").exists()


def test_a_head_that_is_not_the_embedding_it_is_tied_to(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    refused(folder, r"ties the head to the embedding, but lm_head\.weight differs")
    change(folder, lambda tensors: tensors.pop("backbone.embeddings.weight"))
    import_folder(folder, folder.parent / "run")  # it is there under its other name


def test_tokenizers(folder: Path, shared_data: Path) -> None:
    (folder / "bytes.json").unlink()
    refused(folder, r"it has no tokenizer.*; or name one as --tokenizer")
    refused(folder, r"the tokenizer has 50257 tokens, the model has 264", tokenizer=str(shared_data / "gpt2"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((shared_data / "gpt2" / name).read_bytes())
    refused(folder, r"the tokenizer has 50257 tokens")


def test_the_working_folder_is_no_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="holds the working folder"):
        import_folder(folder, Path("."))
    import_folder(folder, Path("../other/../run"))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_an_output_that_is_there(folder: Path) -> None:
    output = folder.parent / "run"
    import_folder(folder, output)
    with pytest.raises(UserError, match="not empty"):
        import_folder(folder, output)
    change(folder, lambda tensors: tensors.pop(NORM))
    with pytest.raises(UserError, match="has no tensor"):
        import_folder(folder, output, overwrite=True)
    assert load_tokenizer(output / "tokenizer").vocab_size == 257  # what was there stays until the new one is whole
    change(folder, lambda tensors: tensors.update({NORM: torch.full((16,), 7.0)}))
    _, config, step = import_folder(folder, output, overwrite=True)
    assert isinstance(config, Config)
    assert step == output / "checkpoints" / "step-00000000"
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        import_folder(folder, folder, overwrite=True)
