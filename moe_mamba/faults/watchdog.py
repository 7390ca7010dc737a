"""A watch beside the training: it ends a run, with one line that says why, where the training itself cannot.

One small thread per rank hears the signals, sees the launcher end, sees the main thread hang, and holds the line to
rank 0's hub, which tells it of other ranks' ends. It costs one look per second, and no collective. One thread a machine
leaves a sign of life every few seconds, and rank 0's notes why a run ends that does not come to its end.
"""

import atexit
import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from moe_mamba.config import Config
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.faults.admission import join_hub
from moe_mamba.faults.coordinator import Hub, hang_line
from moe_mamba.faults.messages import Line, Order, Report
from moe_mamba.faults.signals import Stop
from moe_mamba.parallel.distributed import finish_world, from_all, from_first, has_lost_a_rank
from moe_mamba.parallel.messages import parse
from moe_mamba.parallel.topology import World
from moe_mamba.run.console import Screen
from moe_mamba.run.events import Events
from moe_mamba.run.heartbeats import write_heartbeat

PACKAGE = Path(__file__).resolve().parents[1]
TICK = 1.0
SECONDS_BETWEEN_HEARTBEATS = 5.0
# How long an abort message may take; how long the main thread has to end by itself after it; then the process.
SECONDS_FOR_ABORT = 6.0
SECONDS_TO_LEAVE = 5.0
SECONDS_TO_END = 20


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Watches over a run from its preparation to its end; leaves the process group at the end.

    Where a run cannot go on, one rank prints one line, and every rank ends with a code that is not 0: by an exception
    where the main thread can raise one, else at once.

    Attributes:
        step: steps done, for the line; the trainer sets it.
        is_done: nothing can be lost any more, for all steps are saved; the trainer sets it.
    """

    def __init__(self, config: Config, screen: Screen, world: World) -> None:
        self.timeout, self.grace = config.parallel.timeout, config.checkpoint.grace
        self.screen, self.world = screen, world
        self.folder = Path(config.run.folder)
        self._events = Events(self.folder, world.is_first)
        self._next_heartbeat = 0.0
        self._is_end_noted = False
        self.step = 0
        self.is_done = False
        self.stop = Stop()
        self._hub: Hub | None = None
        self._line: Line | None = None
        self._is_listening = False
        self._first, self._is_remote = "rank 0", False  # and whether it is on another machine
        self._abort_line: str | None = None
        self._is_said = False  # the abort line is on the screen
        self._is_leaving = False  # the main thread has an error with a line of its own
        self._aborted, self._left = threading.Event(), threading.Event()
        self._pending_abort: tuple[float, str] | None = None
        self._stand = Stand()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        faulthandler.enable(2)  # a crash leaves its place in the log
        self.stop.start()
        self._thread.start()
        return self

    def join(self) -> None:
        """Connect the ranks' watches; every rank calls it once, after ``start_world``.

        Raises:
            UserError: rank 0 cannot be reached.
        """
        self.stop.begun = True
        if self.world.size == 1:
            return
        if self.world.is_first:
            self._hub = Hub(lambda: self.step, self.world.size)
            self._hub.start()
        mine = (self._hub.port, self._hub.token, socket.gethostname(), os.getpid()) if self._hub else None
        told = from_first(mine)
        assert told is not None
        port, token, host, process = told
        self._first = f"rank 0 ({host}, process {process})"
        self._is_remote = host != socket.gethostname()
        address = "127.0.0.1" if self.world.is_first else os.environ["MASTER_ADDR"]
        trouble = None
        try:
            self._line = join_hub(address, port, token, self.world.rank)
            self._is_listening = True
        except OSError as error:
            trouble = f"rank {self.world.rank} cannot reach rank 0 at {address}, port {port} ({error}): open it"
        self.stop.ring()
        if first := next(filter(None, from_all(trouble)), None):
            raise UserError(first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving = isinstance(error, (RunStopped, UserError))
        if error is None:
            self._send(Report(bye=True))
        elif self._line is not None:
            self._report(error)
        if error is not None:
            self._note_end(self._abort_line or str(error) or type(error).__name__)
        self._leave(error is None)
        if isinstance(error, RunStopped):
            error.said |= self._is_said
        elif self._abort_line is not None and not isinstance(error, UserError):
            raise RunStopped(self._abort_line, said=self._is_said) from error

    def _report(self, error: BaseException) -> None:
        """Tell the hub why this rank ends, and wait until it has told the root cause."""
        text = str(error)
        if not self._is_leaving:
            traceback.print_exception(error)  # into the log; the screen gets one line
            text = f"{type(error).__name__}: {text.splitlines()[0] if text else ''} (its traceback is in the log)"
        self._send(Report(fault=text, is_secondary=has_lost_a_rank(error)))
        self._aborted.wait(SECONDS_FOR_ABORT)

    def _leave(self, is_valid: bool) -> None:
        """End the thread, the hub and the process group."""
        self._left.set()
        self.stop.ring()
        self._thread.join()
        if self._hub is not None:
            self._hub.close()
        if self._line is not None:
            self._line.close()
        if is_valid:
            finish_world()
            self.stop.finish()
            return
        self.stop.ignore()
        signal.alarm(SECONDS_TO_END)  # leaving a group in which a collective hangs may hang as well
        finish_world()
        signal.alarm(0)
        atexit.register(signal.alarm, SECONDS_TO_END)

    def _note_end(self, reason: str) -> None:
        """Note why a run ends early; one that had not begun has nothing to note."""
        if self.stop.begun and not self._is_end_noted:
            self._is_end_noted = True
            self._events.write("stop", self.step, reason=reason)

    def _send(self, report: Report) -> None:
        if self._line is not None:
            self._line.send(report)

    # What follows runs in the thread.

    def _run(self) -> None:
        while not self._left.is_set():
            ends: list[Any] = [self.stop.heard, *([self._line] if self._is_listening else [])]
            ready = wait(ends, TICK)  # unlike ``select.select``, also for descriptors past 1,023
            self.stop.check()
            if self._line in ready:
                self._hear()
            if self.stop.is_urgent:
                self._end("stopped by a second Ctrl-C", 130)
            self._check_stop()
            still = self._stand.seconds(self.step)
            self._live(still)
            if self._is_listening and still > self.timeout:
                places = {self.world.rank: self._place(), 0: None}
                self._request_abort(hang_line(places, self.timeout), Report(hung=self.timeout))
            if self._pending_abort is not None and time.monotonic() > self._pending_abort[0]:
                self._abort(self._pending_abort[1], self._prints_without_first)

    def _live(self, still: float) -> None:
        """Leave this machine's sign of life, unless the main thread has hung, standing `still` for too many seconds."""
        hangs = self.stop.begun and still > self.timeout
        if self.world.local_rank == 0 and not hangs and time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + SECONDS_BETWEEN_HEARTBEATS
            write_heartbeat(self.folder, socket.gethostname(), self.step)

    @property
    def _prints_without_first(self) -> bool:
        """Whether this rank prints where rank 0 cannot: one on rank 0's machine, and one on each other."""
        return self.world.size == 1 or self.world.rank == 1 or (self._is_remote and self.world.local_rank == 0)

    def _hear(self) -> None:
        """Take in what the hub says; its silent end is rank 0's."""
        assert self._line is not None
        lines = self._line.receive()
        if lines is None:
            self._is_listening = False
            line = f"{self._first} died without an error message (killed, or crashed) after step {self.step:,}"
            self._abort(line, self._prints_without_first)
        for order in filter(None, (parse(Order, line) for line in lines or [])):
            if order.bye:
                self._is_listening = False
            if order.where:
                self._send(Report(place=self._place()))
            if order.abort is not None:
                self._abort(order.abort, self.world.is_first)

    def _check_stop(self) -> None:
        """End what does not come to its end within the grace time."""
        stop = self.stop
        if stop.reason is None or self.is_done:
            return
        waited = time.monotonic() - stop.since
        if not stop.begun:
            if waited > SECONDS_TO_LEAVE:
                error = stop.early_end()
                self._end(str(error), error.code)
        elif waited > self.grace:
            line = (
                f"{stop.reason} came, but the step was not saved within checkpoint.grace={self.grace} s: "
                "the last complete checkpoint is kept"
            )
            self._request_abort(line, Report(fault=line))

    def _place(self) -> str:
        return f"step {self.step + 1:,} in {self._stand.place()}"

    def _request_abort(self, line: str, report: Report) -> None:
        """Ask the hub to abort; where no abort message comes, or there is no hub, `line` is the abort line."""
        if self._pending_abort is None:
            self._pending_abort = (time.monotonic() + (SECONDS_FOR_ABORT if self._is_listening else 0.0), line)
            self._send(report)

    def _abort(self, line: str, prints: bool) -> None:
        """Abort the run: print the line, and end the process if the main thread cannot do it."""
        if self._abort_line is not None:
            return
        self._abort_line = line
        if prints and not self._is_leaving:
            self.screen.shout(f"error: {line}")
            self._is_said = True
        self._note_end(line)
        self._aborted.set()
        if not self._left.wait(SECONDS_TO_LEAVE):
            os._exit(1)

    def _end(self, line: str, code: int) -> None:
        """End at once."""
        if self.world.is_first:
            self.screen.shout(f"error: {line}")
            self._note_end(line)
        os._exit(code)


class Stand:
    """For how long the main thread has stood at one instruction: what a collective that hangs looks like."""

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._where: object = None
        self._seconds = 0.0
        self._looked = time.monotonic()

    def seconds(self, step: int) -> float:
        """Look, and tell; a time in which this thread itself was stopped counts as one tick."""
        where = (step, *((id(frame), frame.f_lasti) for frame in self._frames()))
        now = time.monotonic()
        self._seconds = self._seconds + min(now - self._looked, 2 * TICK) if where == self._where else 0.0
        self._where, self._looked = where, now
        return self._seconds

    def place(self) -> str:
        """File, line and function of this package that the main thread is in."""
        for frame in self._frames():
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                return f"{path.relative_to(PACKAGE.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"
        return "the start"

    def _frames(self) -> Iterator[FrameType]:
        """The main thread's frames, innermost first."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            yield frame
            frame = frame.f_back
