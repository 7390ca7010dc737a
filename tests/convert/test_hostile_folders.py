"""Folders from elsewhere that were changed: the same weights come in, or one line says what is wrong."""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_mamba.convert.from_hf import read_folder
from moe_mamba.errors import UserError
from moe_mamba.hf.formats import FORMATS
from moe_mamba.hf.formats.settings import INERT
from tests.convert.test_from_hf import MODELS, build, write_folder
from tests.hostile import ODD, mutated, mutated_bytes, refusal_of, text_of

CASES = ("own ME", "mamba", "llama 3, biases", "mistral", "mixtral, window", "jamba")
INDEX = "model.safetensors.index.json"
OPTIONAL: dict[str, dict[str, Any]] = {
    "own ME": {"moe": {}},
    "mamba": {"d_inner": None, "n_layer": None, "rms_norm": None},
    "llama 3, biases": {"rope_scaling": {}, "partial_rotary_factor": 1.0, "quantization_config": None},
    "jamba": {"mamba_inner_layernorms": True, "attention_dropout": 0.0, "auto_map": None},
}
"""Keys that formats read and that a folder of ours does not have."""


@pytest.fixture(scope="module")
def folders() -> Iterator[Path]:
    """A folder of each format; their names are short, as the lines hold them."""
    root = Path(tempfile.mkdtemp(prefix="hf"))
    for case in CASES:
        name, keys, moe = MODELS[case]
        write_folder(root / case[:5].strip(), name, build(keys, moe))
    state_spaces(root)
    yield root
    shutil.rmtree(root)


def state_spaces(root: Path) -> None:
    """The same Mamba as state-spaces would publish it."""
    folder = shutil.copytree(root / "mamba", root / "state")
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    keys = {"d_model": 16, "n_layer": 3, "vocab_size": 264, "ssm_cfg": {"d_state": 4, "layer": "Mamba1"}}
    more = {"rms_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": False, "attn_layer_idx": []}
    (folder / "config.json").write_text(json.dumps(keys | more))


def weights(folder: Path) -> dict[str, Tensor]:
    _, _, shards = read_folder(folder, lambda _: None)
    return {shard.name: shard.read() for shard in shards}


def check(folder: Path, expected: dict[str, Tensor] | None = None) -> None:
    """Import; where weights are expected, those that come in are the same."""
    found = weights(folder)
    if expected is not None:
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert found.keys() == expected.keys()


def configurations(tree: dict[str, Any], case: str) -> Iterator[Any]:
    """Every key with every odd value, and without it; and keys inside."""
    yield from ODD
    for key in (*tree, *OPTIONAL.get(case, {}), "model_type", "unknown"):
        if key in INERT - {"model_type"}:
            continue
        yield {name: value for name, value in tree.items() if name != key}
        yield from (tree | {key: value} for value in ODD)
        inside = tree.get(key)
        if isinstance(inside, dict):
            for name in inside:
                yield from (tree | {key: inside | {name: value}} for value in ODD)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)], ids=["each fifth", "all"])
@pytest.mark.parametrize("case", [*CASES, "state"])
def test_every_key_of_config_json_with_odd_values(folders: Path, case: str, step: int) -> None:
    folder = folders / case[:5].strip()
    path = folder / "config.json"
    text = path.read_text()
    expected, tried, refused = weights(folder), 0, 0
    try:
        for tree in islice(configurations(json.loads(text), case), 0, None, step):
            path.write_bytes(text_of(tree))
            refused += refusal_of(partial(check, folder, expected)) is not None
            tried += 1
    finally:
        path.write_text(text)
    print(f"{case}: {tried} changed config.json, {refused} refused")
    assert 0.5 * tried < refused < tried, tried


@pytest.mark.parametrize("file", [INDEX, "model-1.safetensors"])
def test_changed_weights_files(folders: Path, file: str) -> None:
    chance, count, refused = random.Random(15), 600, Counter[bool]()
    folder = folders / "mixtr"
    path, expected = folder / file, weights(folder) if file == INDEX else None
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        for _ in range(count):
            if file == INDEX:
                path.write_bytes(text_of(mutated(json.loads(data), chance)))
            elif chance.random() < 0.5:
                text = text_of(mutated(json.loads(data[8:end]), chance))
                path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
            else:
                path.write_bytes(mutated_bytes(data[:end], chance) + data[end:])
            refused[refusal_of(partial(check, folder, expected)) is not None] += 1
    finally:
        path.write_bytes(data)
    print(f"{count} changed {file}: {refused[True]} refused")
    assert refused[True] > count // 2, count


def refused(folder: Path, says: str) -> None:
    assert says in (refusal_of(partial(check, folder)) or ""), says


@pytest.fixture
def folder(folders: Path, tmp_path: Path) -> Path:
    """A copy of a Mamba."""
    return shutil.copytree(folders / "mamba", tmp_path / "in")


def test_a_byte_order_mark_is_read_over(folder: Path) -> None:
    expected = weights(folder)
    for name in ("config.json", INDEX):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    check(folder, expected)


def test_links_to_blobs_as_in_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    expected = weights(folder)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(os.path.relpath(blob, folder))
    check(folder, expected)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-1.safetensors", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_file(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if name == "model.safetensors":  # then the index is read
        check(folder)
    else:
        refused(folder, ": ")


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a\0b", "\ud800", "a\nb", "x" * 5000]
)
def test_files_outside_the_folder(folder: Path, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["backbone.norm_f.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "has no file ")


def test_sizes_are_compared_with_the_files_before_anything_is_allocated(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    for key, says in (
        ("hidden_size", "has shape [264, 16], but config.json says [264, 65536]"),
        ("vocab_size", "has shape [264, 16], but config.json says [65536, 16]"),
        ("num_hidden_layers", "repeat give an integer from 1 to 4,096"),
    ):
        tree = json.loads(text) | {key: 2**16}
        tree["intermediate_size"] = tree["expand"] * tree["hidden_size"]
        (folder / "config.json").write_text(json.dumps(tree))
        refused(folder, says)
    (folder / "config.json").write_text(json.dumps(json.loads(text) | {"num_hidden_layers": 4000}))
    refused(folder, "config.json says 4,000 layers, but there are only ")


def test_a_torch_file_that_claims_more_than_it_holds(folder: Path) -> None:
    tensors = {name: torch.zeros(1).expand(2**20, 2**20) for name in ("backbone.embeddings.weight", "x")}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, "has tensors larger than its ")
    torch.save({1: torch.zeros(1)}, folder / "pytorch_model.bin")
    refused(folder, "is not a mapping of names to plain tensors")


def test_every_format_is_tried() -> None:
    assert {MODELS[case][0] for case in CASES} | {"state_spaces"} == set(FORMATS)
    with pytest.raises(UserError):
        weights(Path("/nowhere"))
