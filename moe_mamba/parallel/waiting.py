"""How long a rank is in collectives: what is left of a step's time is its own, and tells a slow machine from others."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Those that a step is made of; each is looked up in torch.distributed when it is called, by DeepSpeed and Megatron too.
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor"),
    *("reduce_scatter_tensor", "all_to_all", "all_to_all_single"),
)


class Waiting:
    """Seconds that this rank is in blocking collectives, which are mostly seconds of waiting for the slowest rank.

    On a CPU the time of the call; on a GPU the time between two events of the current stream, read only later, so that
    nothing is synchronised. Not seen: a collective that is waited for later (``async_op``, as ZeRO-3's gathers), and
    DeepSpeed's gather of updated weights, which follows on the reduction of gradients, where ranks have met already.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure while the block lasts, from 0. torch has no hook before a collective: its functions are wrapped."""
        self._seconds, self._events = 0.0, []
        whole = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in whole.items():
            setattr(dist, name, self._wrapped(function))
        try:
            yield
        finally:
            for name, function in whole.items():
                setattr(dist, name, function)

    def seconds(self) -> float:
        """The sum; on a GPU once the step's end was waited for."""
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._on_gpu:
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                pair[0].record()  # type: ignore[no-untyped-call]
                result = function(*arguments, **options)
                pair[1].record()  # type: ignore[no-untyped-call]
                self._events.append(pair)
                return result
            begin = time.perf_counter()
            result = function(*arguments, **options)
            self._seconds += time.perf_counter() - begin
            return result

        return timed
