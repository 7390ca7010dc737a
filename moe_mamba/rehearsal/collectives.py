"""What travels between ranks, as torch's own dispatcher sees it: megatron-core's, DeepSpeed's and our collectives.

It is the same under gloo, NCCL and torch's "fake" process groups, and while groups are made.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sizes = tuple[int, ...]


class Collective(NamedTuple):
    """One call on one rank.

    Attributes:
        kind: what it does.
        group: the ranks that take part, by their numbers in the world, in the group's order.
        bytes: of the larger side of it on this rank: what an all-gather gives, what a reduce-scatter takes, what an
            all-reduce changes, what an all-to-all sends.
        dtype: of what travels, such as "float32".
        root: by its number in the world, the rank from which a broadcast or scatter comes or to which a reduce or
            gather goes; the other rank of a send or receive (-1: any). None for all else.
        sent: bytes to each rank of the group, of an all-to-all; else None.
        received: bytes from each rank of the group, likewise.
        channel: 0, or how many groups of the same ranks this rank had made before this one: two groups of the same
            ranks do not wait for each other.
    """

    kind: str
    group: tuple[int, ...]
    bytes: int
    dtype: str = "float32"
    root: int | None = None
    sent: Sizes | None = None
    received: Sizes | None = None
    channel: int = 0


class _Operator(NamedTuple):
    """How to read one operator: what it does, and its argument that is counted, times the ranks or once."""

    kind: str
    counted: str
    times_ranks: bool = False


KINDS = {
    "c10d::allreduce_": _Operator("all-reduce", "tensors"),
    "c10d::allreduce_coalesced_": _Operator("all-reduce", "tensors"),
    "c10d::_allgather_base_": _Operator("all-gather", "output_tensor"),
    "c10d::allgather_": _Operator("all-gather", "output_tensors"),
    "c10d::allgather_coalesced_": _Operator("all-gather", "output_lists"),
    "c10d::allgather_into_tensor_coalesced_": _Operator("all-gather", "outputs"),
    "c10d::_reduce_scatter_base_": _Operator("reduce-scatter", "input_tensor"),
    "c10d::reduce_scatter_": _Operator("reduce-scatter", "input_tensors"),
    "c10d::reduce_scatter_tensor_coalesced_": _Operator("reduce-scatter", "inputs"),
    "c10d::alltoall_base_": _Operator("all-to-all", "input"),
    "c10d::alltoall_": _Operator("all-to-all", "input_tensors"),
    "c10d::broadcast_": _Operator("broadcast", "tensors"),
    "c10d::reduce_": _Operator("reduce", "tensors"),
    "c10d::gather_": _Operator("gather", "input_tensors", times_ranks=True),
    "c10d::scatter_": _Operator("scatter", "output_tensors", times_ranks=True),
    "c10d::send": _Operator("send", "tensors"),
    "c10d::recv_": _Operator("receive", "tensors"),
    "c10d::recv_any_source_": _Operator("receive", "tensors"),
    "c10d::barrier": _Operator("barrier", "tensor"),
    "c10d::monitored_barrier_": _Operator("barrier", "tensor"),
    "_c10d_functional::all_reduce": _Operator("all-reduce", "input"),
    "_c10d_functional::all_reduce_": _Operator("all-reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": _Operator("all-reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": _Operator("all-reduce", "inputs"),
    "_c10d_functional::all_gather_into_tensor": _Operator("all-gather", "input", times_ranks=True),
    "_c10d_functional::all_gather_into_tensor_out": _Operator("all-gather", "input", times_ranks=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": _Operator("all-gather", "inputs", times_ranks=True),
    "_c10d_functional::reduce_scatter_tensor": _Operator("reduce-scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": _Operator("reduce-scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": _Operator("reduce-scatter", "inputs"),
    "_c10d_functional::all_to_all_single": _Operator("all-to-all", "input"),
    "_c10d_functional::broadcast": _Operator("broadcast", "input"),
    "_c10d_functional::broadcast_": _Operator("broadcast", "input"),
    "_c10d_functional::isend": _Operator("send", "tensor"),
    "_c10d_functional::irecv": _Operator("receive", "tensor"),
}
SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::check_for_nan")


class Recording(TorchDispatchMode):
    """Notes in `found` every operator that talks to other ranks; an unknown one is an error, so that none is missed.

    On a CPU autograd calls backward functions and hooks in the thread that called ``backward``, and elsewhere it takes
    the modes along, so they are seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []
        self._groups: dict[dist.ProcessGroup, tuple[tuple[int, ...], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, _, _ = func.name().partition(".")
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            if name not in KINDS:
                raise NotImplementedError(f"{name} is a collective that rehearsal/collectives.py cannot read")
            names = (argument.name for argument in func._schema.arguments)
            self.found.append(self._read(KINDS[name], dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _read(self, operator: _Operator, given: dict[str, Any]) -> Collective:
        group = _group_of(given)
        if group not in self._groups:
            self._groups[group] = tuple(dist.get_process_group_ranks(group)), _channel(group)
        ranks, channel = self._groups[group]
        tensors = [leaf for leaf in tree_leaves(given[operator.counted]) if isinstance(leaf, Tensor)]
        size = _bytes(tensors) * (len(ranks) if operator.times_ranks else 1)
        root = next((given[key] for key in ("root_rank", "src", "dst") if key in given), None)
        if root is None and operator.kind == "receive":
            root = -1
        elif root is not None:
            root = ranks[root]
        sent, received = _splits(given, len(ranks)) if operator.kind == "all-to-all" else (None, None)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        return Collective(operator.kind, ranks, size, dtype, root, sent, received, channel)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _splits(given: dict[str, Any], ranks: int) -> tuple[Sizes, Sizes]:
    """Bytes to and from each rank of an all-to-all."""
    if "input_tensors" in given:  # a tensor for each rank
        sides = (given["input_tensors"], given["output_tensors"])
        to, back = (tuple(_bytes([one]) for one in side) for side in sides)
        return to, back
    row = given["input"].element_size() * given["input"].shape[1:].numel()
    even = (_bytes([given["input"]]) // ranks,) * ranks  # where no splits are named
    named = (given["input_split_sizes"], given["output_split_sizes"])
    sent, received = (tuple(int(rows) * row for rows in splits) or even for splits in named)
    return sent, received


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup:
    group: Any = given["process_group"] if "process_group" in given else given["group_name"]
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group))
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _channel(group: dist.ProcessGroup) -> int:
    """How many groups of the same ranks this rank has made before."""
    ranks, before = dist.get_process_group_ranks(group), 0
    for other in dist.distributed_c10d._world.pg_map:
        if other == group:
            break
        before += dist.get_process_group_ranks(other) == ranks
    return before


@contextlib.contextmanager
def recording() -> Iterator[list[Collective]]:
    """Collect, while it lasts, every collective that this rank takes part in, in order."""
    with Recording() as mode:
        yield mode.found
