"""What a step does that costs time or breaks on a GPU: collectives, waits, mixed devices, and memory that it takes."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, in_kernel_invocation_manager

from moe_mamba.rehearsal.collectives import Recording
from moe_mamba.rehearsal.device import TYPE
from moe_mamba.rehearsal.memory import Ledger

PACKAGE = Path(__file__).parents[1]
ROOT = f"{PACKAGE}/"
HERE = f"{PACKAGE / 'rehearsal'}/"
PASSED_BY = (
    HERE,
    f"{PACKAGE / 'parallel' / 'waiting.py'}",
)  # the latter stands between every collective and its caller
DEEPSPEED = "/deepspeed/"
# Function of DeepSpeed's -> what the memory that it makes is for, where the phase does not say so.
KINDS_OF_DEEPSPEED = {
    "_fill_param_grad_accum_attribute": "gradients",
    "_build_compact_grad_partition_buffer": "gradients",
    "copy_grads_in_partition": "gradients",
}
# Operators whose result's shape or value is only known once the device is done, and what else the host waits for.
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
SIZES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive")
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
VIEWS = {torch.ops.aten.view.default, torch.ops.aten.slice.Tensor, torch.ops.aten.as_strided.default}
# Operator of ours -> operands that are promised in fp32 wherever the model computes in bf16.
PROMISED = {
    "selective_scan": ("A", "D", "delta_bias"),
    "combine_rows": ("weight",),
    "rms_norm": ("weight",),
}


class Fault(Exception):
    """What would break the real run: one line, without the place."""


@dataclass(frozen=True)
class Note:
    """Something at a line of our code, and how often.

    Attributes:
        what: the operator.
        place: ``moe_mamba/parallel/expert.py:230 read_sizes``, or the operator whose gradient is computed.
        phase: of the step.
        count: how often.
    """

    what: str
    place: str
    phase: str
    count: int


class Stage(Recording):
    """Sees every operator of a rank that is rehearsed; entered inside ``FakeTensorMode``.

    Attributes:
        found: collectives, in order.
        places: of each of them.
        phase: of what is done: start, engine, forward, backward, update.
        is_warm: whether what is done comes again in every step.
        ledger: of memory.
        promised: shape -> parameters that are kept in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.phase = "start"
        self.is_warm = False
        self.ledger = Ledger()
        self.promised: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        self._mixed: Counter[tuple[str, str, str]] = Counter()
        self._waits: Counter[tuple[str, str, str]] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch.compile works under this mode."""
        return True

    @property
    def mixed(self) -> list[Note]:
        """Operators that had operands on the device and in the host's memory."""
        return [Note(*key, count) for key, count in self._mixed.items()]

    @property
    def waits(self) -> list[Note]:
        """Where the host waits for the device."""
        return [Note(*key, count) for key, count in self._waits.items()]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        given = list(_tensors((*args, *kwargs.values())))
        on_device = any(tensor.device.type == TYPE for tensor in given)
        self._check_devices(func, name, given, on_device)
        self._check_promises(func, name, args, kwargs)
        if name in READS:
            if on_device:
                self.note_wait(name)
            try:
                return func(*args, **kwargs)
            except DataDependentOutputException:
                return _stand_in_value(given[0])
        if on_device and name in SIZES:
            raise Fault(f"{name} has a size that only the data knows, which rehearsal cannot know")
        if func.namespace == "c10d":
            check_sizes(func, args, kwargs)
        before = len(self.found)
        made = _view(func, args, kwargs) if func in VIEWS else super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.found) > before:
            self.places += [where().line] * (len(self.found) - before)
        if name in COPIES and on_device and _is_waited_for(name, made, args, kwargs):
            self.note_wait(f"{name} to the host")
        if new := self.ledger.new(_tensors((made,))):
            place = where()
            self.ledger.take(new, self._kind(place), place.line, place.is_deepspeed)
        return made

    def _kind(self, place: "Place") -> str:
        """What memory is for, by who makes it and when."""
        if place.function in KINDS_OF_DEEPSPEED:
            return KINDS_OF_DEEPSPEED[place.function]
        if self.phase in ("forward", "backward"):
            return "communication" if place.is_deepspeed else "activations"
        if self.phase == "update":
            return "update"
        return "communication" if self.phase == "engine" and place.is_deepspeed else "other"

    def note_wait(self, what: str) -> None:
        """Note that the host waits for the device, where it is now."""
        self._note(self._waits, what)

    def _note(self, notes: Counter[tuple[str, str, str]], name: str) -> None:
        phase = self.phase if self.is_warm or self.phase in ("start", "engine") else "first steps"
        notes[name, where().line, phase] += 1

    def _check_devices(self, func: OpOverload, name: str, given: list[Tensor], on_device: bool) -> None:
        on_host = [tensor for tensor in given if tensor.device.type == "cpu"]
        is_collective = func.namespace in ("c10d", "_c10d_functional")
        if is_collective and on_host and "barrier" not in name:  # torch makes a barrier's tensor where it likes
            raise Fault(f"{name} is given a tensor in the host's memory, which NCCL does not send: {_shown(on_host)}")
        if not on_device or not on_host or name in COPIES:
            return
        if func.namespace == "moe_mamba":
            raise Fault(f"{name}, a kernel of the GPU, is given a tensor in the host's memory: {_shown(on_host)}")
        self._note(self._mixed, name)

    def _check_promises(self, func: OpOverload, name: str, args: tuple, kwargs: dict) -> None:
        if name == "aten::_to_copy" and kwargs.get("dtype") in (torch.bfloat16, torch.float16):
            for owner, parameter in self.promised.get(args[0].shape, ()):
                if _are_same(parameter, args[0]):
                    raise Fault(f"{owner} is promised in fp32, and is cast to {kwargs['dtype']}")
        if func.namespace != "moe_mamba" or not self.promised:
            return
        operation = name.removeprefix("moe_mamba::")
        names = next((promised for one, promised in PROMISED.items() if operation.startswith(one)), ())
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name in names and isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                raise Fault(f"{name} is given {argument.name} in {value.dtype}, which is promised in fp32")


def _view(func: OpOverload, args: tuple, kwargs: dict) -> Tensor:
    """Another view of a tensor without numbers, by torch's own kernel for shapes.

    ``FakeTensorMode`` would compute it in Python, a hundred times as slowly, and remembers it by the offset, which is
    another one for each parameter in DeepSpeed's buffers.
    """
    tensor = args[0]
    if type(tensor) is not FakeTensor or tensor.fake_mode.shape_env is not None:
        return func(*args, **kwargs)
    with in_kernel_invocation_manager(tensor.fake_mode):
        made = func(*args, **kwargs)
    return FakeTensor(tensor.fake_mode, made, tensor.device)


def _stand_in_value(tensor: Tensor) -> bool | int | float:
    """What is read where there are no values: no flag is set, and every number is one."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 1


def _is_waited_for(name: str, made: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes to the host, and the host waits until it is there."""
    if not isinstance(made, Tensor) or made.device.type != "cpu":
        return False
    is_free = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    return not is_free


def check_sizes(func: OpOverload, args: tuple, kwargs: dict) -> None:
    """Refuse a collective whose buffers do not fit its group, as NCCL's would be refused: fake groups look at nothing.

    Raises:
        Fault: says the sizes.
    """
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    name = func.name().partition(".")[0]
    if "process_group" not in given:
        return
    size = torch.distributed.ProcessGroup.unbox(given["process_group"]).size()
    if name == "c10d::_allgather_base_":
        _require(name, given["output_tensor"].numel(), given["input_tensor"].numel() * size, size)
    elif name == "c10d::_reduce_scatter_base_":
        _require(name, given["input_tensor"].numel(), given["output_tensor"].numel() * size, size)
    elif name == "c10d::allgather_":
        for parts in given["output_tensors"]:
            _require(f"{name}: tensors", len(parts), size, size)
    elif name == "c10d::alltoall_base_":
        for side, splits in (("input", "input_split_sizes"), ("output", "output_split_sizes")):
            rows = len(given[side])
            if given[splits]:
                _require(f"{name}: {splits}", len(given[splits]), size, size)
                _require(f"{name}: rows of the {side}", rows, sum(given[splits]), size)
            elif rows % size:
                raise Fault(
                    f"{name} sends {rows} rows evenly among a group of {size} ranks, which does not divide them"
                )


def _require(what: str, found: int, expected: int, size: int) -> None:
    if found != expected:
        raise Fault(f"{what}: {found:,} elements where a group of {size} ranks makes it {expected:,}")


def _shown(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in tensors)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same numbers: ZeRO-3 gathers several parameters into one memory."""
    is_one = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return is_one and one.storage_offset() == other.storage_offset()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class Place(NamedTuple):
    """Whose code runs.

    Attributes:
        line: of ours, ``moe_mamba/parallel/expert.py:230 read_sizes``; or the function whose gradient is computed, for
            then an operator has no line of Python's.
        function: of DeepSpeed's that runs below it; empty: none does.
    """

    line: str
    function: str

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's code runs below ours."""
        return bool(self.function)


def where() -> Place:
    """Whose code runs now."""
    frame: FrameType | None = sys._getframe(1)
    function = ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(ROOT) and not path.startswith(PASSED_BY):
            return Place(f"moe_mamba/{path.removeprefix(ROOT)}:{frame.f_lineno} {name}", function)
        if name == "_engine_run_backward":
            break
        if not function and DEEPSPEED in path and name not in ("wrapped_fn", "log_wrapper"):
            function = name
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return Place(f"gradient of {node.name()}" if node is not None else "outside our code", function)
