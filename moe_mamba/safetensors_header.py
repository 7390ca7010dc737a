"""The header of a safetensors file, for files that are written part by part.

The library's own writer wants every tensor of a file at once. The format: 8 bytes that hold the length of the JSON
behind them (little-endian), that JSON, and the tensors in its order (github.com/huggingface/safetensors, "Format").
Whoever reads such files does so with the library, or by a note of where each tensor begins.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from moe_mamba.errors import brief
from moe_mamba.json_file import LIMIT, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes: tensors begin at a multiple of their element's size where wide dtypes come first


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def make_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[int]]:
    """The header of a file that holds these tensors one behind the other, in this order.

    Args:
        tensors: of different names.
        metadata: text about the file.

    Returns:
        The bytes that the file begins with, and the byte at which each tensor begins; last, the file's size.
    """
    ends = list(accumulate((tensor.bytes for tensor in tensors), initial=0))
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for tensor, begin, end in zip(tensors, ends, ends[1:], strict=False):
        content[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + end for end in ends]


def fault_of_header(path: Path, tensors: Mapping[str, tuple[TensorInfo, int]]) -> str | None:
    """What in the header of a file contradicts a note of what the file holds; None where nothing does.

    Args:
        path: the file.
        tensors: name -> tensor, and the byte of the file at which it begins: all that the file holds.
    """
    with path.open("rb") as stream:
        size = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LIMIT):
            return f"its header has {length:,} bytes"
        try:
            content = parse_json(stream.read(length))
        except ValueError as error:
            return f"its header: {brief(error, 100)}"
    if not isinstance(content, dict):
        return "its header is no object"
    if content.keys() != tensors.keys():
        return f"only one has {brief(min(content.keys() ^ tensors.keys()))}"
    end = 8 + length
    for tensor, start in sorted(tensors.values(), key=lambda place: (place[1], place[0].bytes)):
        if start != end:
            return f"{brief(tensor.name)} begins at byte {start:,}, not {end:,}"
        begin, end = end - 8 - length, end + tensor.bytes
        note = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if content[tensor.name] != note | {"data_offsets": [begin, end - 8 - length]}:
            return f"{brief(tensor.name)} is {brief(content[tensor.name])}"
    return None if end == size else f"tensors end at byte {end:,}"
