"""What keeps a diverged run out of its checkpoints: numbers that are NaN or Inf, and the step that came after a save.

That all numbers are finite is not enough to go on from: after an update that is far too large, weights are finite and
their next loss is NaN. So training notes in `next_step.json`, beside a checkpoint's files, what the step made from it
gave. A checkpoint whose next step has a loss or a gradient that is not finite has diverged: no run goes on from it.
One without the note is not known yet: it is used, and an older one stays besides until it is known.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.utils import get_total_norm

from moe_mamba.atomic_file import write_atomically
from moe_mamba.checkpoint.manifest import OTHER, Chunk, DamagedError, is_marked_finite, read_index
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.checkpoint.storage import read_chunk
from moe_mamba.errors import UserError, brief
from moe_mamba.json_file import Record, Text, check, read_json

NEXT_STEP = "next_step.json"
PART = 2**23  # elements of a stored tensor looked at together


@torch.no_grad()
def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or Inf, nor becomes Inf in bf16, in which weights may run.

    A reduction on the tensors' device, and one read of its result. Integers and empty tensors are finite.
    """
    known = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(get_total_norm(known, math.inf).bfloat16().isfinite())


def first_not_finite(shards: Iterable[Shard]) -> str | None:
    """Name the first tensor in memory that is not finite, see `is_finite`; or None."""
    held = [shard for shard in shards if shard.read is None]
    if is_finite(shard.tensor for shard in held):
        return None
    return next(shard.name for shard in held if not is_finite([shard.tensor]))


def check_finite(folder: Path) -> None:
    """Look for NaN and Inf in a step's folder that an older version wrote; newer ones refuse to write them.

    Raises:
        DamagedError: names the first tensor that has one.
    """
    if is_marked_finite(folder):
        return
    for name, tensor in read_index(folder).items():
        if not all(is_finite([part]) for chunk in tensor.chunks for part in _parts(folder, chunk, tensor.dtype)):
            raise DamagedError(f"{folder}: {brief(name)} holds NaN or Inf: {OTHER}")


def _parts(folder: Path, chunk: Chunk, dtype: torch.dtype) -> Iterator[Tensor]:
    """The numbers of a stored chunk, flat, some at a time."""
    elements = math.prod(chunk.sizes)
    with (folder / chunk.file).open("rb", buffering=0) as stream:
        for first in range(0, elements, PART):
            part = torch.empty(min(PART, elements - first), dtype=dtype)
            read_chunk(stream, chunk.start, (elements,), (first,), part, dtype)
            yield part


class DivergedError(DamagedError):
    """The step that was made from a checkpoint has a loss or a gradient that is not finite."""


class NextStep(NamedTuple):
    """The step that was made from a checkpoint.

    Attributes:
        loss: in nats/token.
        gradient_norm: over all ranks, before clipping; None where the loss is not finite, for there is none then.
    """

    loss: float
    gradient_norm: float | None

    @property
    def is_finite(self) -> bool:
        """Whether training could go on."""
        return self.gradient_norm is not None and math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def __str__(self) -> str:
        """Both figures, for people."""
        norm = "" if self.gradient_norm is None else f", gradient norm {self.gradient_norm:.4g}"
        return f"loss {self.loss:.4f}{norm}"


def write_next_step(folder: Path, next_step: NextStep) -> None:
    """Note what the step after a checkpoint gave, in its folder, whole or not at all.

    A finite step stays noted: that the weights do not serve is known to be untrue then, whatever came later.
    """
    known = read_next_step(folder)
    if known is not None and known.is_finite:
        return
    # JSON has no NaN and no Inf; as text, float() reads them back.
    content = {name: value if value is None else str(value) for name, value in next_step._asdict().items()}
    write_atomically(folder / NEXT_STEP, json.dumps(content) + "\n")


def read_next_step(folder: Path) -> NextStep | None:
    """What the step after a checkpoint gave; None where it is not known, for it was not made yet."""
    path = folder / NEXT_STEP
    try:
        note = check(read_json(path, OTHER), _NOTE, path, OTHER)
        norm = note.gradient_norm
        return NextStep(float(note.loss), None if norm is None else float(norm))
    except (UserError, ValueError):
        return None


class _Note(Record):
    loss: Text
    gradient_norm: Text | None


_NOTE = TypeAdapter(_Note)


def has_diverged(folder: Path) -> bool:
    """Whether the step after a checkpoint is known to have a loss or a gradient that is not finite."""
    next_step = read_next_step(folder)
    return next_step is not None and not next_step.is_finite
