"""Numbers on their way between host and device, for which neither waits before it has to."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Moment:
    """A moment of a device's work: on a GPU when all that was ordered before it is done, on a CPU now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()  # type: ignore[no-untyped-call]
        self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Wait until it has come."""
        if self._event is not None:
            self._event.synchronize()  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: "Moment") -> float:
        """The time between two moments of one device; waits until both have come."""
        if self._event is None:
            return self._seconds - earlier._seconds
        self.wait()
        return float(earlier._event.elapsed_time(self._event)) / 1000  # type: ignore[union-attr, no-untyped-call]


class Reading:
    """Numbers of a device on their way to the host; on a GPU to pinned memory, so that the host goes on meanwhile.

    Args:
        numbers: (numbers,) of any device.

    Attributes:
        moment: when they are there.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
        self.moment = Moment(numbers.device)

    def values(self) -> list[float]:
        """The numbers; waits until they are there."""
        self.moment.wait()
        values: list[float] = self._numbers.tolist()
        return values


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """(numbers,) float64 on `device`, which need not be idle for it."""
    on_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)
