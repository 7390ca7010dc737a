"""The screen belongs to the user: a header, a bar, a few lines. What libraries chatter goes to the run's log."""

import contextlib
import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

# A terminal is redrawn often; a log file that takes the bar's place is not filled with it.
SECONDS_BETWEEN_BARS = {True: 0.3, False: 15.0}


class Patient(io.TextIOWrapper):
    """A terminal that may go away, with its launcher or its window, or a log on a full disk: the run outlives it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(os.fdopen(descriptor, "wb", buffering=0), encoding="utf-8", write_through=True)  # type: ignore[arg-type]

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            return super().write(text)
        return 0

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError):
            super().flush()


class Lines(tqdm):  # type: ignore[type-arg]
    """A bar where nothing can be drawn over, as in a pipe or a file: a line for each time it would be drawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line."""
        self.fp.write(f"{self if msg is None else msg}\n")

    def clear(self, nolock: bool = False) -> None:
        """Leave what is printed."""

    def close(self) -> None:
        """Print that all is done; where it is not, the last line is what says why."""
        if not self.disable:
            if self.n == self.total:
                self.display()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


class Screen(contextlib.AbstractContextManager["Screen"]):
    """Owns the terminal while a run lasts; everything else that is printed is appended to `log`.

    File descriptors 1 and 2 themselves are redirected, so that C libraries and child processes are caught as well.
    Other ranks than the first say nothing on the screen.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._silent = int(os.environ.get("RANK", "0")) != 0
        self._bar: tqdm | None = None

    def __enter__(self) -> "Screen":
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = [os.dup(1), os.dup(2)]
        self._terminal: TextIO = Patient(os.dup(1))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.close(descriptor)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Patient(os.dup(1)), Patient(os.dup(2))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = self._streams
        for number, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self._terminal.close()

    def say(self, line: str = "") -> None:
        """Print a line above the bar, and into the log."""
        print(line, flush=True)
        if not self._silent:
            self._print(line)

    def shout(self, line: str) -> None:
        """Print a line on the screen and into the log, from whatever rank."""
        print(line, flush=True)
        self._print(line)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        elif self._silent and self._terminal.isatty():
            self._terminal.write("\n")  # rank 0's bar may stand in this line
        self._terminal.write(f"{line}\n")  # in one piece: other ranks write here as well

    def start_bar(self, done: int, steps: int) -> None:
        """Show a bar of `steps`, `done` of which an earlier start has made."""
        is_terminal = self._terminal.isatty()
        kind = tqdm if is_terminal else Lines
        self._bar = kind(
            total=steps,
            initial=done,
            unit="step",
            file=self._terminal,
            disable=self._silent,
            dynamic_ncols=True,
            mininterval=SECONDS_BETWEEN_BARS[is_terminal],
            bar_format="{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt}  {desc}  {remaining} left",
        )

    def advance(
        self, loss: float | None, tokens_per_second: float, tflops: float | None = None, mfu: float | None = None
    ) -> None:
        """Move the bar by one step.

        Args:
            loss: nats/token; None: a step without loss, of which the bar says nothing.
            tokens_per_second: of all devices.
            tflops: of a device, as in the metrics; None: not said.
            mfu: of a device, a share of 1; None: not known.
        """
        assert self._bar is not None
        if loss is not None:
            used = "" if tflops is None else f"  {tflops:.3g} TFLOP/s"
            used += "" if mfu is None else f" ({mfu:.0%} MFU)"
            self._bar.set_description_str(f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s{used}", refresh=False)
        self._bar.update()

    def stop_bar(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
