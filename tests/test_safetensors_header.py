"""The header of safetensors files: the bytes that it always was, and what the library makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.hf.safetensors_files import write_tensors
from moe_mamba.safetensors_header import DTYPES, TensorInfo, make_header

TENSORS = {
    "wide": torch.arange(3, dtype=torch.float64),
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.ones(2, 1, dtype=torch.bfloat16),
}
DATA = b"".join(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in TENSORS.values())


def test_a_checkpoint_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    shards = [Shard(f"x/{name}", tuple(t.shape), (0,) * t.dim(), t) for name, t in TENSORS.items()]
    shards[1:2] = [Shard("x/w", (2, 3), (row, 0), TENSORS["w"][row : row + 1]) for row in range(2)]
    path = store.save(tmp_path, 1, shards, {})
    assert (path / "rank-00000.safetensors").read_bytes() == (
        (288).to_bytes(8, "little")
        + b'{"x/wide": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}, '
        b'"x/w@0,0": {"dtype": "F32", "shape": [1, 3], "data_offsets": [24, 36]}, '
        b'"x/w@1,0": {"dtype": "F32", "shape": [1, 3], "data_offsets": [36, 48]}, '
        b'"x/half": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [48, 52]}}'.ljust(288)
        + DATA
    )


def test_an_export_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    def read(tensors: Sequence[TensorInfo]) -> list[Tensor]:
        return [TENSORS[tensor.name] for tensor in tensors]

    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in reversed(TENSORS.items())]
    (path,) = write_tensors(tmp_path, infos, 1000, read)
    assert path.read_bytes() == (
        (240).to_bytes(8, "little")
        + b'{"__metadata__": {"format": "pt"}, '
        b'"wide": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}, '
        b'"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]}, '
        b'"half": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [48, 52]}}'.ljust(240)
        + DATA
    )


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "of": "größe"}])
def test_the_library_reads_every_dtype_and_shape(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    shapes = [(), (0,), (3,), (2, 0, 5), (2, 3)]
    tensors = {f"{name}{shape}": torch.ones(shape, dtype=dtype) for name, dtype in DTYPES.items() for shape in shapes}
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, starts = make_header(infos, metadata)
    data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    (tmp_path / "file").write_bytes(header + data)
    assert starts[0] == len(header) and len(header) % 8 == 0 and starts[-1] == (tmp_path / "file").stat().st_size
    assert list(json.loads(header[8:]).items())[-1][1]["data_offsets"] == [start - len(header) for start in starts[-2:]]
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
