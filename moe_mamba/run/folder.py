"""The folder of a run: what is in it, and whether what is asked may go on in it."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_mamba.atomic_file import remove_leftovers
from moe_mamba.config import Config
from moe_mamba.config_file import changed_on_resume, load_config, save_config
from moe_mamba.errors import UserError
from moe_mamba.file_lock import lock
from moe_mamba.run import events, metrics

STARTING_POINT = "step-00000000"  # of weights that were imported or upcycled: training saves only later steps


class InUse(UserError):
    """Another run has the folder: perhaps the same one, on a machine that was lost and whose lock has yet to expire."""


class RunFolder:
    """Paths inside a run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.plots = self.path / "plots"
        self.profile = self.path / "profile"
        self.log = self.path / "log.txt"
        self.checksums = self.path / "checksums.json"
        self.preflight = self.path / "preflight.json"

    def open(self, config: Config) -> None:
        """Make the folder, or check that `config` may go on in it.

        Raises:
            UserError: the folder holds another run, or cannot be made or written.
        """
        try:
            if any(self.checkpoints.glob("step-*")):
                self._check_resume(config)
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_writable()
        except OSError as error:
            part = Path(error.filename or self.path)
            where = f"{part.name}: " if part.parent == self.path else ""
            raise UserError(
                f"run.folder={self.path} cannot be written ({where}{error.strerror}): choose another, or correct this"
            ) from None

    def _check_writable(self) -> None:
        """Find out now what a run would write in vain later.

        Raises:
            OSError: a folder, or a file that is there, cannot be written; its name is the error's.
        """
        for folder in (self.path, self.checkpoints, self.tokenizer, self.plots):
            if folder == self.path or os.path.lexists(folder):
                _try_to_write(folder)
        for file in (self.log, self.config, self.path / metrics.FILE, self.path / events.FILE):
            if not os.path.lexists(file):
                continue
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file", str(file))
            file.open("ab").close()

    @contextmanager
    def locked(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """Keep other runs out of the folder while this one lasts; the lock ends with the process.

        Args:
            say: prints a line, where the file system has no locks.

        Raises:
            UserError: another run is at work in it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if not _lock(descriptor, self.path):
                say(
                    f"warning   the file system of {self.path} has no locks: nothing keeps a second run out of it, "
                    "so start none there"
                )
            for folder in (self.path, self.tokenizer):
                remove_leftovers(folder)
            yield
        finally:
            os.close(descriptor)

    def forget_tokenizer(self) -> None:
        """Drop a tokenizer that a run left behind which ended before its first checkpoint."""
        shutil.rmtree(self.tokenizer, ignore_errors=True)

    @property
    def next_free(self) -> Path:
        """A folder beside this one that does not exist yet."""
        number = 2
        while (free := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        return free

    def save_config(self, config: Config) -> None:
        """Keep the resolved configuration beside the run; the file by itself reproduces it."""
        save_config(config, self.config)

    def _check_resume(self, config: Config) -> None:
        if not self.config.is_file():
            raise UserError(f"run.folder={self.path} has checkpoints but no config.yaml: choose another run.folder")
        if [path.name for path in self.checkpoints.glob("step-*")] == [STARTING_POINT]:
            raise UserError(
                f"run.folder={self.path} holds weights to start from, not a run to resume: "
                f"give --run.folder={self.next_free} --train.warm_start={self.path}"
            )
        saved = load_config(self.config)
        for key, before, now in changed_on_resume(saved, config):
            raise UserError(
                f"{key} was {before!r} in {self.path} and is now {now!r}, which a resumed run cannot change: "
                f"start over with --run.folder={self.next_free}"
            )


def _try_to_write(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _lock(descriptor: int, path: Path) -> bool:
    try:
        return lock(descriptor)
    except BlockingIOError:
        raise InUse(f"{path} is in use by another run: wait for it, or choose another run.folder") from None
