"""A run's figures: `metrics.jsonl` always, Weights & Biases and TensorBoard when asked."""

import contextlib
import json
import logging as python_logging
import math
import netrc
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config import LoggingConfig
from moe_mamba.errors import UserError

FILE = "metrics.jsonl"
log = python_logging.getLogger(__name__)


class MetricsWriter:
    """Appends lines to a run's `metrics.jsonl`, and passes them on.

    A resumed run first drops what an earlier process wrote past the step that it resumes from, so that the file reads
    as one curve that was never interrupted.

    Args:
        folder: the run's folder.
        step: the step that the run starts from; lines past it, and a truncated last line, are dropped.
        logging: whether Weights & Biases and TensorBoard get the figures too.
        config: the resolved configuration, for Weights & Biases.
        enabled: False on all ranks but one: nothing is written there.
        say: prints a line, where a service fails: a run goes on without it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        logging: LoggingConfig,
        config: dict[str, Any],
        enabled: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.enabled, self._say = enabled, say
        self.services: list[Service] = []
        if not enabled:
            return
        path = Path(folder) / FILE
        path.touch()
        os.truncate(path, _end_of_step(path, step))
        self.stream = path.open("a", buffering=1)
        if logging.wandb:
            self._open(WeightsAndBiases, Path(folder), logging.wandb, config)
        if logging.tensorboard:
            self._open(TensorBoard, Path(folder), step)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it has at least `step`. Numbers that are not finite become null, as JSON has none."""
        if not self.enabled:
            return
        self.stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        figures = dict(_flat(line))
        step = int(figures.pop("step"))
        for service in list(self.services):
            self._attempt(service, service.write, step, figures)

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self.stream.close()
        for service in list(self.services):
            self._attempt(service, service.close)

    def _open(self, kind: Any, *arguments: Any) -> None:
        try:
            self.services.append(kind(*arguments))
        except Exception as error:
            self._give_up(kind.NAME, error)

    def _attempt(self, service: "Service", call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # of its own kinds, for a full disk, a lost network, a process of its own that died
            self.services.remove(service)
            self._give_up(service.NAME, error)

    def _give_up(self, name: str, error: Exception) -> None:
        """Go on without a service; the figures are in the file."""
        log.warning("%s failed", name, exc_info=error)
        why = " ".join((str(error) or type(error).__name__).split())
        self._say(f"warning   {name} cannot be written ({why[:160]}): the run goes on, its figures stay in {FILE}")


class Service(Protocol):
    """Where figures go besides the file."""

    NAME: str

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Pass on the figures of a step."""

    def close(self) -> None:
        """Flush."""


class TensorBoard:
    """TensorBoard events in the run's folder `tensorboard`."""

    NAME = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One scalar a figure."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush."""
        self.writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    """A run at Weights & Biases, offline where there is no key or no network; resumed runs go on in the same one."""

    NAME = "Weights & Biases"

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        name = folder / "wandb" / "run_id.txt"
        if not name.exists():
            write_atomically(name, uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=project,
            name=folder.name,
            id=name.read_text().strip(),
            dir=str(folder),
            config=config,
            resume="allow",
            mode=_wandb_mode(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One figure a key."""
        self.run.log(figures, step=step)

    def close(self) -> None:
        """Send or keep what is left."""
        self.run.finish()


def _wandb_mode() -> Any:
    """WANDB_MODE where the user set it; else online if there is a key and the server answers."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or ""
    if os.environ.get("WANDB_API_KEY") or _has_password(host):
        with contextlib.suppress(OSError):
            port = server.port or (80 if server.scheme == "http" else 443)
            socket.create_connection((host, port), timeout=3).close()
            return "online"
    return "offline"


def _has_password(host: str) -> bool:
    """Whether the user's netrc, where `wandb login` writes its key, knows `host`."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics, in order; a last line truncated by a kill is left out.

    Raises:
        UserError: there is no such file, or a line of it is not JSON.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has trained")
    lines = []
    for number, (line, _) in enumerate(_lines(path), 1):
        if line is None:
            raise UserError(f"{path}, line {number}: not a line of metrics: remove it")
        lines.append(line)
    return lines


def lacks_validation(folder: Path, step: int) -> bool:
    """Whether a run's metrics, where there are any, have no scores of a step; damaged lines are passed over."""
    path = folder / FILE
    lines = [line for line, _ in _lines(path) if line is not None] if path.is_file() else []
    return bool(lines) and not any("validation" in line and line["step"] == step for line in lines)


def router_label(name: str) -> str:
    """A router's name in metrics: its layer's index, and what of the name says more where a layer has several."""
    return name.removeprefix("layers.").replace(".mixer", "").removesuffix(".router")


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Each whole line of a file of metrics, None where it is damaged, and the byte at which it ends."""
    end = 0
    with path.open("rb") as stream:
        for text in stream:
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            is_one = isinstance(line, dict) and isinstance(line.get("step"), int)
            end += len(text)
            yield line if is_one else None, end


def _end_of_step(path: Path, step: int) -> int:
    """Bytes of the file up to its last whole line of `step` or before; a damaged one before that stays."""
    last = 0
    for line, end in _lines(path):
        if line is not None and line["step"] > step:
            break
        if line is not None:
            last = end
    return last


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Single figures with paths as names; of a list (an expert each), the largest: hundreds would be unreadable."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield f"{prefix}{key}/largest", max(value)
        elif value is not None:
            yield f"{prefix}{key}", value
