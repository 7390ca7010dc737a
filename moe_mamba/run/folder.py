"""The folder of a run: what is in it, and whether what is asked may go on in it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_mamba.atomic_file import remove_leftovers
from moe_mamba.config import Config
from moe_mamba.config_file import changed_on_resume, load_config, save_config
from moe_mamba.errors import UserError

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
            UserError: the folder holds another run, or cannot be made.
        """
        if any(self.checkpoints.glob("step-*")):
            self._check_resume(config)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder={self.path} cannot be created ({error.strerror}): choose another") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder while this one lasts; the lock ends with the process.

        Raises:
            UserError: another run is at work in it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            _lock(descriptor, self.path)
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


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(f"{path} is in use by another run: wait for it, or choose another run.folder") from None
