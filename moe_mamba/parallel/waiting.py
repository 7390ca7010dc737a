"""How long a rank is in collectives: what is left of a step's time is its own, and tells a slow machine from others."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

# What every collective comes down to, whoever calls it and by whatever name: a method that begins it, and the wait.
BEGIN = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier"),
    *("allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)
# On a GPU besides: where the host or a stream waits for other streams, as for ZeRO's, which reduces beside the passes.
JOIN = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Stream, "wait_event"))


class Waiting:
    """Seconds that this rank is in collectives, which are mostly seconds of waiting for the slowest rank.

    On a CPU the time of the calls; on a GPU the time between events of the stream that is current where measuring
    begins, read only later, so that nothing is synchronised: of a collective that runs beside the computing, what this
    stream waits for it at its end.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure while the block lasts, from 0. torch has no hook at a collective: its methods are wrapped."""
        self._seconds, self._events = 0.0, []
        methods: list[tuple[Any, str]] = [(ProcessGroup, name) for name in BEGIN if name in vars(ProcessGroup)]
        methods.append((Work, "wait"))
        if self._on_gpu:
            self._stream = torch.cuda.current_stream()
            methods += JOIN
        whole = [vars(owner)[name] for owner, name in methods]  # as they lie there, to be put back
        for owner, name in methods:
            setattr(owner, name, self._wrapped(getattr(owner, name)))
        try:
            yield
        finally:
            for (owner, name), method in zip(methods, whole, strict=True):
                setattr(owner, name, method)

    def seconds(self) -> float:
        """The sum; on a GPU once the step's end was waited for."""
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._on_gpu:
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                pair[0].record(self._stream)  # type: ignore[no-untyped-call]
                result = method(*arguments, **options)
                pair[1].record(self._stream)  # type: ignore[no-untyped-call]
                self._events.append(pair)
                return result
            begin = time.perf_counter()
            result = method(*arguments, **options)
            self._seconds += time.perf_counter() - begin
            return result

        return timed
