"""Where the time of a training step goes: torch.profiler's own times, gathered by operation, and by kernel on a GPU."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from benchmarks.pairs import Run

LABEL = "operation: "  # marks the forward passes of modules in the profiler's events
MODULES = {
    "Experts": "experts",
    "LinearExperts": "experts",
    "SwitchExperts": "experts",
    "MoE": "routing",
    "Router": "routing",
    "RMSNorm": "norms",
    "LayerNorm": "norms",
}
# Part of the name of an autograd function, in small letters -> operation.
FUNCTIONS = {"scan": "scan", "conv": "convolution", "crossentropy": "loss", "norm": "norms"}
FUNCTIONS |= {"gather": "routing", "combine": "routing"}
PRODUCTS = (
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::linear",
    "aten::matmul",
    "aten::baddbmm",
    "moe_mamba::linear_cpu",
)
LOSSES = ("aten::cross_entropy_loss", "NllLoss", "LogSoftmax")
REST = "rest"
KERNELS = 25  # that the table names


@dataclass(frozen=True)
class Profile:
    """A profiled step.

    Attributes:
        what: was profiled.
        milliseconds: of a step without the profiler.
        operations: operation -> milliseconds per step, by the profiler.
        kernels: the dearest kernels of a GPU as (name, milliseconds per step, launches per step).
    """

    what: str
    milliseconds: float
    operations: dict[str, float]
    kernels: list[tuple[str, float, float]]

    def table(self) -> str:
        """Shares by operation in Markdown, and by kernel where there are any."""
        total = sum(self.operations.values()) or 1.0
        lines = [f"| {self.what}: {self.milliseconds:,.1f} ms | share | ms |", "|---|---|---|"]
        lines += [f"| {name} | {spent / total:.1%} | {spent:,.2f} |" for name, spent in self.operations.items()]
        if self.kernels:
            lines += [f"| all kernels, against the step's time | {total / self.milliseconds:.1%} | {total:,.2f} |", ""]
            lines += ["| kernel | share | ms | launches |", "|---|---|---|---|"]
            lines += [
                f"| `{name[:90]}` | {spent / total:.1%} | {spent:,.2f} | {calls:.0f} |"
                for name, spent, calls in self.kernels
            ]
        return "\n".join(lines)


def profile(what: str, model: nn.Module, step: Run, steps: int) -> Profile:
    """Profile ``steps`` training steps of ``model``: kernels where it lies on a GPU, operators on a CPU.

    Forward passes are known by the module that they run in, backward passes by the forward operator that they belong
    to (both carry the same sequence number).
    """
    on_gpu = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    step()
    with _labelled(model):
        step()
        wall = _wall(step, steps, on_gpu)
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(steps):
                step()
            if on_gpu:
                torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CPU]
    operations = _by_operation(events, on_gpu)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        for kernel in _kernels(event):
            spent[kernel.name] += kernel.duration
            calls[kernel.name] += 1
    dearest = sorted(spent, key=lambda name: -spent[name])[:KERNELS]
    return Profile(
        what,
        wall,
        {name: operations[name] / steps / 1e3 for name in sorted(operations, key=lambda name: -operations[name])},
        [(name, spent[name] / steps / 1e3, calls[name] / steps) for name in dearest],
    )


@contextmanager
def _labelled(model: nn.Module) -> Iterator[None]:
    """Record the forward pass of each module of ``MODULES`` under its operation."""
    with ExitStack() as stack:
        for module in model.modules():
            operation = MODULES.get(type(module).__name__)
            if operation is not None:
                running: list[Any] = []

                def begin(*_: Any, running: list[Any] = running, label: str = LABEL + operation) -> None:
                    running.append(record_function(label))
                    running[-1].__enter__()

                def end(*_: Any, running: list[Any] = running) -> None:
                    running.pop().__exit__(None, None, None)

                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
        yield


def _wall(step: Run, steps: int, on_gpu: bool) -> float:
    """Milliseconds of a step."""
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / steps


def _by_operation(events: list[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Operation -> microseconds."""
    forward: dict[int, str] = {}  # by sequence number
    backward_of: list[tuple[FunctionEvent, list[FunctionEvent]]] = []
    sums: dict[str, float] = defaultdict(float)
    for event in events:  # in order of time: the last forward operator of a number is the one with a gradient
        chain = list(_ancestors(event))
        if any("evaluate_function" in one.name for one in chain):
            backward_of.append((event, chain))
            continue
        operation = _operation(chain)
        if event.sequence_nr >= 0:
            forward[event.sequence_nr] = operation
        sums[operation] += _time(event, on_gpu)
    for event, chain in backward_of:
        operation = _operation(chain)
        if operation in (REST, "matrix products"):
            root = next(one for one in chain if "evaluate_function" in one.name)
            operation = forward.get(root.sequence_nr, operation)
        sums[operation] += _time(event, on_gpu)
    return {name: spent for name, spent in sums.items() if spent}


def _time(event: FunctionEvent, on_gpu: bool) -> float:
    return sum(kernel.duration for kernel in _kernels(event)) if on_gpu else event.self_cpu_time_total


def _kernels(event: FunctionEvent) -> list[Any]:
    """What an event itself launched on the GPU; a label's own reflection there is no kernel."""
    return [kernel for kernel in event.kernels if kernel.name != event.name]


def _ancestors(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _operation(chain: list[FunctionEvent]) -> str:
    """What an event belongs to, by its name and those of the events around it, the innermost first."""
    names = [event.name for event in chain]
    if any(name.startswith("Optimizer.") for name in names):
        return "optimizer"
    for name in names:
        if "::" not in name:  # no operator of torch's
            for part, operation in FUNCTIONS.items():
                if part in name.lower():
                    return operation
    label = next((name.removeprefix(LABEL) for name in names if name.startswith(LABEL)), None)
    if label is not None:
        return label
    if any(loss in name for name in names for loss in LOSSES):
        return "loss"
    if any(name in PRODUCTS for name in names):
        return "matrix products"
    return REST
