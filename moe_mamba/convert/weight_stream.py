"""The weights of a checkpoint under the names of another format, read in parts and never held whole."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size, Tensor

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats import WayOut
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.names import logical_names
from moe_mamba.safetensors_header import TensorInfo

PART = 64 * 2**20  # bytes read at once, of one tensor or of several


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor of theirs, as a view (on the meta device, its strides say which) of a tensor of ours."""

    ours: str
    shape: tuple[int, ...]
    view: Tensor
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.view.numel() * self.view.element_size()


class WeightStream:
    """The tensors of a step's folder, as `format` has them.

    Args:
        path: the step's folder.
        format: what they shall become.
        model: of the checkpoint.
        moe: of the checkpoint.
        dtype: of what is written; parameters that stay fp32 in bf16 training stay so with 16 bits.
    """

    def __init__(self, path: Path, format: WayOut, model: ModelConfig, moe: MoEConfig, dtype: torch.dtype) -> None:
        built = LanguageModel.on_meta(model, moe)
        self.path = path
        self._ours = {name: tensor.detach() for name, tensor in built.logical_tensors().items()}
        names = logical_names(built)
        wide = {names[name] for name in built.fp32_parameter_names()}
        self._entries = {entry.theirs: entry for entry in format.entries(model, moe)}
        self.headers = []
        for name, entry in self._entries.items():
            shape = tuple(entry.view(self._ours[entry.ours]).shape)
            self.headers.append(TensorInfo(name, torch.float32 if entry.ours in wide else dtype, shape))

    def read(self, headers: Sequence[TensorInfo]) -> Iterator[Tensor]:
        """The values of these tensors, in this order, each in contiguous parts of whole rows.

        Raises:
            UserError: the checkpoint is of another model, or damaged.
        """
        waiting: list[_Part] = []
        for part in (part for header in headers for part in self._parts(header)):
            if waiting and sum(other.bytes for other in waiting) + part.bytes > PART:
                yield from self._load(waiting)
                waiting = []
            waiting.append(part)
        yield from self._load(waiting)

    def _parts(self, header: TensorInfo) -> Iterator[_Part]:
        entry = self._entries[header.name]
        ours = self._ours[entry.ours]
        view = entry.view(ours)
        row = view.numel() // max(1, len(view)) * view.element_size() if view.dim() else 0
        for rows in view.split(max(1, PART // row)) if row else (view,):
            yield _Part(entry.ours, tuple(ours.shape), rows, header.dtype)

    def _load(self, parts: Iterable[_Part]) -> Iterator[Tensor]:
        """Read parts in one go, then give them one by one."""
        shards, views = [], []
        for part in parts:
            offsets, sizes = chunk_of(part.view, part.shape)
            chunk = torch.empty(sizes)
            shards.append(Shard(f"weights/{part.ours}", part.shape, offsets, chunk))
            views.append((_same_view(part.view, part.shape, chunk), part.dtype))
        store.load(self.path, shards)
        for view, dtype in views:
            yield view.to(dtype).contiguous()


def chunk_of(view: Tensor, shape: Sequence[int]) -> tuple[tuple[int, ...], Size]:
    """(offsets, sizes) of the chunk of a contiguous tensor of `shape` that `view` shows; it shows a whole chunk."""
    first = int(view.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in _axes(view))
    begin, end = _place(first, shape), _place(last, shape)
    return begin, Size(stop - start + 1 for start, stop in zip(begin, end, strict=True))


def _place(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Index, along each dimension, of the element with the flat index `flat`."""
    place: list[int] = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        place.append(index)
    return tuple(reversed(place))


def _same_view(view: Tensor, shape: Sequence[int], chunk: Tensor) -> Tensor:
    """What `view` is of a contiguous tensor of `shape`, of `chunk`: the tensor's strides become the chunk's."""
    whole = torch.empty(shape, device="meta").stride()
    # A dimension of size one has no stride to speak of.
    strides = {old: new for old, new, size in zip(whole, chunk.stride(), chunk.shape, strict=True) if size > 1}
    return chunk.as_strided(view.shape, [strides.get(stride, 1) if size > 1 else 1 for size, stride in _axes(view)])


def _axes(view: Tensor) -> Iterator[tuple[int, int]]:
    return zip(view.shape, view.stride(), strict=True)
