"""The raw metrics of a table's runs in one small file, from which anybody makes the table again.

Each run has its configuration beside its metrics. Validation losses are whole. Of the rest six digits are kept, and of
experts' loads what the table reads: the end. No path of the machine that made them is in it, nor its name.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moe_mamba.atomic_file import put_in_place
from moe_mamba.errors import UserError
from moe_mamba.reproduce.gathering import LAST, Result
from moe_mamba.reproduce.runs import ONE_RATE, Run, Workspace
from moe_mamba.reproduce.text import FILE as TEXT
from moe_mamba.reproduce.text import Facts, name_of
from moe_mamba.run.events import FILE as EVENTS
from moe_mamba.run.events import read_events
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import FILE as METRICS
from moe_mamba.run.metrics import read_metrics

SUFFIX = ".tar.xz"
DIGITS = 6
WHOLE = ("step", "tokens", "validation_loss")
# What the state of a run, its hours and what it was made with are read from.
OF_EVENTS = ("time", "event", "step", "action", "device", "versions")


def check_archive(path: Path) -> None:
    """Raise a UserError where no archive can be written to a path."""
    if not path.name.endswith(SUFFIX):
        raise UserError(f"--archive={path}: give a file that ends in {SUFFIX}")
    if path.is_dir():
        raise UserError(f"--archive={path} is a folder: give a file")
    if not path.parent.is_dir():
        raise UserError(f"--archive={path}: there is no folder {path.parent}: make it first")
    if path.is_file() and not tarfile.is_tarfile(path):
        raise UserError(f"--archive={path} is there, and is no archive: give another file, or move it away")


def write_archive(result: Result, path: Path) -> None:
    """Write metrics and events of all finished runs of a table, and what its text was.

    Unpacked, the folder is an ``--output`` of which ``--gather`` makes the same table.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    with tarfile.open(unfinished, "w:xz", preset=9) as archive:
        for name, content in _files(result.workspace):
            entry = tarfile.TarInfo(name)
            data = content.encode()
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    put_in_place(unfinished, path)


def _files(workspace: Workspace) -> Iterator[tuple[str, str]]:
    if workspace.text is not None:
        yield f"text/{TEXT}", json.dumps(_anonymous(workspace.text), indent=1) + "\n"
    for run in _runs(workspace):
        if run.is_done:
            events, _ = read_events(run.folder)
            yield f"{run.name}/{RunFolder(run.folder).config.name}", _configuration(run)
            yield f"{run.name}/{EVENTS}", _lines({key: one[key] for key in OF_EVENTS if key in one} for one in events)
            yield f"{run.name}/{METRICS}", _lines(_short(line, run.config.steps) for line in read_metrics(run.folder))


def _configuration(run: Run) -> str:
    """Of a run, with its folder and its text by their names alone."""
    tree = run.config.model_dump()
    tree["run"]["folder"] = run.name
    data = run.config.data
    tree["data"] |= {
        "train": [name_of(source) for source in data.train_weights],
        "validation": {name: name_of(source) for name, source in data.validation_sets.items()},
        "tokenizer": name_of(data.tokenizer),
        "cache": name_of(data.cache),
    }
    return yaml.safe_dump(tree, sort_keys=False)


def _runs(workspace: Workspace) -> Iterator[Run]:
    rows = list(workspace.table.rows)
    yield from workspace.sweep(rows)
    for row in rows:
        yield from workspace.runs(row, workspace.seeds(workspace.kind(), row))
        yield from workspace.one_rate(row, workspace.seeds(workspace.kind(ONE_RATE), row))


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _short(line: dict[str, Any], steps: int) -> dict[str, Any]:
    has_load = line["step"] > (1 - LAST) * steps
    kept = {key: value for key, value in line.items() if key != "expert_load" or has_load}
    return {key: value if key in WHOLE else _rounded(value) for key, value in kept.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return value


def _anonymous(text: Facts) -> dict[str, Any]:
    """The text's facts with files by their names alone; of flags only that they were given."""
    return text.model_dump() | text.public() | {
        "asked": {key: "given" if value else "" for key, value in text.asked.items()},
        "train": [name_of(source) for source in text.train],
        "validation": name_of(text.validation),
        "tokenizer": name_of(text.tokenizer),
    }  # fmt: skip
