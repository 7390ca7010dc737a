"""Being asked to stop: by a signal, or by the end of the launcher that started this process."""

import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import psutil

from moe_mamba.errors import RunStopped

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
REASONS = (*SIGNALS, "the end of its launcher")
# Taken over even where they were ignored: SIGUSR1 is a site's warning, from which launch/*.sh protect the launcher.
ALWAYS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}
# One Ctrl-C may come twice: from the terminal, and from a launcher that passes it on.
SECONDS_BETWEEN_INTERRUPTS = 1.0


def end_before_the_run() -> None:
    """Let a signal that asks to stop end this process with its line, until a run hears signals itself (`Stop`)."""
    for number in ALWAYS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    print(f"error: stopped by {name} before the run began: nothing is lost", file=sys.stderr)
    sys.exit(143)  # passes through libraries that are being imported, and catch every Exception


class Stop:
    """Hears the signals that ask a process to stop; the main thread reads `asked` when it can act on it.

    Until the run has begun (`begun`), a signal ends the process by an exception in the main thread: nothing is lost.

    Attributes:
        reason: the first reason that there was, one of `REASONS`; None: go on.
        since: when it came, in seconds of the monotonic clock.
        begun: whether steps may be lost by ending at once.
        is_urgent: Ctrl-C came a second time.
        heard: readable, for ``select``, as soon as a signal has come, whatever the main thread does.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.since = 0.0
        self.begun = False
        self.is_urgent = False
        self.launchers = launchers()
        self.heard, self._bell = socket.socketpair()
        self._interrupted = 0.0

    @property
    def asked(self) -> list[int]:
        """A one beside the reason among `REASONS`: summed over ranks, it tells all of them why to stop."""
        return [int(self.reason == reason) for reason in REASONS]

    def start(self) -> None:
        """Take the signals over; for the main thread."""
        for end in (self.heard, self._bell):
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._before: dict[int, Any] = {}
        for name in SIGNALS:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN or number in ALWAYS:  # nohup's wish is kept
                self._before[number] = signal.signal(number, self._handle)

    def finish(self) -> None:
        """Give the signals back; after a Ctrl-C that the run heard, one more would only disturb the process's end."""
        for number, handler in self._before.items():
            is_heard = number == signal.SIGINT and self.reason == "SIGINT"
            signal.signal(number, signal.SIG_IGN if is_heard else handler)
        self.close()

    def ignore(self) -> None:
        """Ignore signals: the process ends by itself, and a launcher's SIGTERM must not truncate its last messages."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self.close()

    def close(self) -> None:
        """Close the bell."""
        signal.set_wakeup_fd(self._wakeup)
        self.heard.close()
        self._bell.close()

    def ring(self) -> None:
        """Wake who waits for `heard`."""
        self._bell.send(b"\0")

    def ask(self, reason: str) -> None:
        """Ask to stop; the first reason is the one that counts."""
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason

    def check(self) -> None:
        """Take in what has come, in a thread that watches: signals at once, and the launcher's end."""
        try:
            numbers = self.heard.recv(64)
        except BlockingIOError:
            numbers = b""
        for number in numbers:
            if number == signal.SIGINT:
                self._count_interrupt()
            if number in self._before:
                self.ask(signal.Signals(number).name)
        if self.reason is None and not all(map(_is_alive, self.launchers)):
            self.ask(REASONS[-1])
            if not self.begun:
                os.kill(os.getpid(), signal.SIGTERM)  # the way into the main thread

    def _count_interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted and now - self._interrupted > SECONDS_BETWEEN_INTERRUPTS:
            self.is_urgent = True
        self._interrupted = self._interrupted or now

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if not self.begun:
            raise self.early_end()

    def early_end(self) -> RunStopped:
        """What ends a run that has not begun. Not 0: a launcher must end the processes that were not asked."""
        code = 130 if self.reason == "SIGINT" else 143
        return RunStopped(f"stopped by {self.reason} before the run began: nothing is lost", code=code)


def launchers() -> list[psutil.Process]:
    """The launcher that started this process and those above it (`deepspeed` is two); none where none did."""
    found: list[psutil.Process] = []
    try:
        for process in psutil.Process().parents():
            if not LAUNCHERS & {os.path.basename(word) for word in process.cmdline()[:4]}:
                break
            found.append(process)
    except psutil.Error:  # another user's, or just gone
        pass
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
