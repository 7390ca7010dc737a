"""A device that is apart from the CPU and has no memory: what stands for the GPU of the rank that is rehearsed.

torch lets Python make a device of its own (PrivateUse1). Fake tensors on it have shapes, dtypes and a device, pass
through autograd, and refuse operands of another device; fake CUDA tensors abort where torch has no CUDA as soon as they
need gradients. DeepSpeed asks an accelerator for all that it does with devices: one of ours names this device.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from moe_mamba.errors import UserError
from moe_mamba.kernels.stand_in import StandIn, use
from moe_mamba.parallel.topology import World
from moe_mamba.rehearsal import attention

TYPE = "gpu"
# Name, as ``planning.cluster`` has it -> compute capability and multiprocessors, by NVIDIA's data sheets (SXM).
GPUS = {"a100-80": ((8, 0), 108), "h100": ((9, 0), 132), "h200": ((9, 0), 132), "b200": ((10, 0), 148)}


@dataclass(frozen=True)
class RehearsedWorld(World):
    """The processes of a run of which this one plays a rank; its device is the one that stands for a GPU."""

    @property
    def device(self) -> torch.device:
        """The device of this process: the only one that there is."""
        return torch.device(TYPE, 0)


def stand_for(gpu: str) -> None:
    """Let the device stand for a GPU, whose kernels it is given from now on.

    Raises:
        UserError: the GPU is not known.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu={gpu} is not known: choose one of {', '.join(GPUS)}")
    _register()
    if find_spec("triton") is None:
        _define_triton()
    use(StandIn(TYPE, *GPUS[gpu]))


@functools.cache
def _register() -> None:
    """Make the device; a process can do it once."""
    _setup_privateuseone_for_python_backend(TYPE, _Backend())
    dist.Backend.backend_capability[dist.Backend.FAKE].append(TYPE)
    attention.register()


class _Backend(_DummyBackendModule):
    """What torch asks about the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of ``torch.autocast``, which recomputation enters, off, as the first pass was."""
        return [torch.bfloat16, torch.float16]


def _define_triton() -> None:
    """Where Triton cannot be installed: let its kernels be defined, which are never launched here."""

    class Constant:
        def __init__(self, value: Any) -> None:
            self.value = value

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else jit

    triton, language = ModuleType("triton"), ModuleType("triton.language")
    language.constexpr = Constant  # type: ignore[attr-defined]
    triton.jit, triton.language = jit, language  # type: ignore[attr-defined]
    sys.modules |= {"triton": triton, "triton.language": language}


class WithoutNumbers(FakeTensorMode):
    """Tensors without numbers, and nothing made on the device first, as torch does where a device is compiled in."""

    @property
    def avoid_device_init(self) -> bool:
        """Whether ``torch.tensor(..., device=...)`` is made in the host's memory and brought to the device."""
        return True


class Stream:
    """A stream on which nothing runs; what waits for it need not."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing is to be waited for."""

    def wait_event(self, event: "Event") -> None:
        """As ``wait_stream``."""

    def synchronize(self) -> None:
        """As ``wait_stream``."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event that has happened."""
        return event or Event()


class Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None:
        """Nothing is to be recorded."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is to be waited for."""

    def synchronize(self) -> None:
        """As ``wait``."""

    def query(self) -> bool:
        """It has happened."""
        return True


def _accelerator(local_size: int) -> Any:
    """What DeepSpeed asks about the device: it answers as for CUDA, but for what only CUDA has."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        def __init__(self) -> None:
            super().__init__()
            self._name, self._communication_backend_name = TYPE, "fake"

        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, device_index: int | None = None) -> str:
            return TYPE if device_index is None else f"{TYPE}:0"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(TYPE, 0)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{TYPE}:0"

        def device_count(self) -> int:
            return local_size

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == TYPE

        def stream(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def current_stream(self, device_index: int | None = None) -> Stream:
            return Stream()

        def default_stream(self, device_index: int | None = None) -> Stream:
            return Stream()

    Accelerator.Stream, Accelerator.Event = Stream, Event
    return Accelerator()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another value in the place of an attribute while the block lasts."""
    before, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:  # it is inherited
            delattr(owner, name)


@contextlib.contextmanager
def fake_accelerator(local_size: int) -> Iterator[None]:
    """Let DeepSpeed use the device while the block lasts."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    before = get_accelerator()
    set_accelerator(_accelerator(local_size))
    try:
        with replaced(torch.Tensor, "record_stream", lambda tensor, stream: None):
            yield
    finally:
        set_accelerator(before)
