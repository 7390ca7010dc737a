"""Every weight a pure function of (seed, its logical name, expert index).

So a weight does not depend on the order of modules, on how many experts stand beside it, or on the device it
lives on: whichever layout asks for a shard of a weight, it can make the same numbers.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from moe_mamba.config import ModelConfig
from moe_mamba.model.names import logical_names

Initializer = Callable[[Tensor, Generator], None]


def ones(weight: Tensor, generator: Generator) -> None:
    """Fill with ones."""
    weight.fill_(1.0)


def zeros(weight: Tensor, generator: Generator) -> None:
    """Fill with zeros."""
    weight.zero_()


def normal(std: float) -> Initializer:
    """Normal of mean 0 and the given standard deviation."""

    def fill(weight: Tensor, generator: Generator) -> None:
        weight.normal_(0.0, std, generator=generator)

    return fill


def truncated_normal(fan_in: int) -> Initializer:
    """Normal of std sqrt(0.1 / fan_in), truncated at two of them (Switch Transformer, section 2.4)."""
    std = math.sqrt(0.1 / fan_in)

    def fill(weight: Tensor, generator: Generator) -> None:
        nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)

    return fill


def uniform(fan_in: int, scale: float = 1.0) -> Initializer:
    """Uniform in ±scale / sqrt(fan_in), so of std scale / sqrt(3 fan_in): what torch's Linear starts with."""
    bound = scale / math.sqrt(fan_in)

    def fill(weight: Tensor, generator: Generator) -> None:
        weight.uniform_(-bound, bound, generator=generator)

    return fill


def matrix(config: ModelConfig, fan_in: int, residual: bool = False) -> Initializer:
    """How a matrix of attention, feed-forward or an expert starts.

    Args:
        config: says which initialisation; ``authors`` is the truncated normal of the paper's code for all.
        fan_in: inputs of the matrix.
        residual: it writes to the residual stream; by default it then starts smaller by sqrt(model.updates), so that
            the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    if config.initialization == "authors":
        return truncated_normal(fan_in)
    return uniform(fan_in, 1.0 / math.sqrt(config.updates) if residual else 1.0)


def embedding_weight(config: ModelConfig) -> Initializer:
    """How the embedding starts; the authors' counts a fan-in of one."""
    return truncated_normal(1) if config.initialization == "authors" else normal(0.02)


def head_weight(config: ModelConfig) -> Initializer:
    """How the head starts."""
    return truncated_normal(config.d_model) if config.initialization == "authors" else normal(0.02)


def _generator(seed: int, name: str, expert: int | None) -> Generator:
    """Make the generator of one weight: a CPU one, so that every device gets the same numbers."""
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))


@dataclass(frozen=True)
class LogicalWeight:
    """A parameter or buffer of the whole model, or one expert's slice of it, before its numbers are made.

    Attributes:
        path: full name of the tensor in the module.
        name: its logical name, from which the numbers follow.
        expert: its index in the whole model, for a slice of stacked experts; else None.
        make: gives the numbers, fp32 on the CPU.
    """

    path: str
    name: str
    expert: int | None
    make: Callable[[], Tensor]


def logical_weights(model: nn.Module, seed: int) -> Iterator[LogicalWeight]:
    """Every parameter and buffer of ``model``, which may lie on the meta device, one after the other.

    A module that owns parameters says how they start: ``initializers()`` maps a name inside the module to what
    fills it. A module with ``is_stacked`` holds stacked experts: each slice of the first axis has its own generator, by
    the expert's index.

    Raises:
        RuntimeError: a parameter or buffer that no module says how to fill: a fault of ours.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    left, names = set(tensors), logical_names(model)
    for prefix, module in model.named_modules():
        if not hasattr(module, "initializers"):
            continue
        for local, fill in module.initializers().items():
            path = f"{prefix}.{local}" if prefix else local
            left.remove(path)
            name, shape = names[path], tensors[path].shape
            if getattr(module, "is_stacked", False):
                for expert in range(shape[0]):
                    yield LogicalWeight(path, name, expert, partial(_make, shape[1:], fill, seed, name, expert))
            else:
                yield LogicalWeight(path, name, None, partial(_make, shape, fill, seed, name, None))
    if left:
        raise RuntimeError(f"no initializer for {', '.join(sorted(left))}")


def _make(shape: torch.Size, fill: Initializer, seed: int, name: str, expert: int | None) -> Tensor:
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    fill(value, _generator(seed, name, expert))
    return value


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a whole ``model``, in place.

    Args:
        model: on any device but meta (``to_empty`` comes first), in any dtype.
        seed: of the run.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for weight in logical_weights(model, seed):
        target = tensors[weight.path]
        (target if weight.expert is None else target[weight.expert]).copy_(weight.make())
