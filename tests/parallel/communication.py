"""What travels between ranks, as torch's own dispatcher sees it: megatron-core's, DeepSpeed's and our collectives."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """One call on one rank.

    Attributes:
        kind: what it does.
        group: the ranks that take part.
        bytes: of the larger side of it on this rank: what an all-gather gives, what a reduce-scatter takes, what an
            all-reduce changes, what an all-to-all sends.
    """

    kind: str
    group: tuple[int, ...]
    bytes: int


# Operator -> what it does, and the position of the tensors that are counted.
KINDS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::barrier": ("barrier", 0),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0),
}
SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


class _Counting(TorchDispatchMode):
    """Notes every operator that talks to other ranks; an unknown one is an error, so that none is missed.

    On a CPU autograd calls backward functions and hooks in the thread that called ``backward``, so they are seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, _, _ = func.name().partition(".")
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            kind, position = KINDS[name]
            tensors = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.found.append(Collective(kind, _members(args), size))
        return func(*args, **(kwargs or {}))


def _members(args: tuple) -> tuple[int, ...]:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
        if isinstance(argument, str) and argument not in ("sum", "avg", "max"):
            return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(argument)))
    raise AssertionError("a collective without a group")


@contextlib.contextmanager
def counting() -> Iterator[list[Collective]]:
    """Collect, while it lasts, every collective that this rank takes part in, in order.

    That none was missed is checked against the number of calls that gloo itself counts in each group.
    """
    before = _calls_of_groups()
    with _Counting() as mode:
        yield mode.found
    calls = Counter(call.group for call in mode.found)
    assert _calls_of_groups() - before == calls, "gloo has counted other calls"


def _calls_of_groups() -> Counter[tuple[int, ...]]:
    """Ranks of each group that this rank is in -> calls so far."""
    calls: Counter[tuple[int, ...]] = Counter()
    for group in dist.distributed_c10d._world.pg_map:
        calls[tuple(dist.get_process_group_ranks(group))] += group._get_sequence_number_for_group()
    return calls
