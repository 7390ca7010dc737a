"""Where the time goes from a process's start to the end of its first step."""

import time

import psutil


class StartUp:
    """Seconds of wall time by part; together they are all the time since this process was started.

    A launcher's own time is not in it.

    Attributes:
        seconds: part -> its seconds, in the order in which the parts were first reached.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - _age()

    def reached(self, part: str) -> None:
        """Count the time since the part before as this part's, or as more of it."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def describe(self) -> str:
        """What people see: the parts that took some time."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{sum(self.seconds.values()):.1f} s to the end of the first step: {parts}"


def _age() -> float:
    """Seconds since this process was started."""
    begun = psutil.Process().create_time()
    if hasattr(time, "CLOCK_BOOTTIME"):  # on Linux, where psutil knows the machine's start to the whole second only
        return time.clock_gettime(time.CLOCK_BOOTTIME) - (begun - psutil.boot_time())
    return time.time() - begun
