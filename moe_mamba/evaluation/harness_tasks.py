"""Tasks of EleutherAI's evaluation harness: found by name or as local files, and run. Needs the package lm-eval."""

import contextlib
import difflib
import io
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from moe_mamba.errors import UserError
from moe_mamba.evaluation.harness import HarnessModel

LOCAL_FORMATS = {"json", "csv", "text", "parquet", "arrow", "xml"}  # of `dataset_path`, read from local files
SECONDS_FOR_HUB = 5  # to answer before it counts as out of reach; its client would try for 23
BOOTSTRAPS = 1000  # for standard errors without a formula: they are then right within 2 %
PYTHON_SEED, SEED = 0, 1234  # the harness's own, so that few-shot examples and shuffled choices are the same


def load_tasks(specs: list[str]) -> list[Task | Group]:
    """Tasks and groups with their data.

    Args:
        specs: the harness's names of tasks, groups and tags, with * in them or not; task files (.yaml); folders of
            such (written with a /).

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    files = {spec: _files(spec) for spec in specs if "/" in spec or spec.endswith((".yaml", ".yml"))}
    groups = {file: name for found in files.values() for file in found if (name := _group(file))}
    # Reading the harness's 10,000 files takes seconds: for names, and for local groups, which may hold its tasks.
    needs_names = len(files) < len(set(specs)) or bool(groups)
    needs_hub = needs_names or not all(_is_local(file) for found in files.values() for file in found)
    loaded: list[Task | Group] = []
    with _quiet(), _hub() if needs_hub else contextlib.nullcontext():
        manager = TaskManager(include_path=sorted({file.parent for file in groups}), include_defaults=needs_names)
        for spec in specs:
            # The harness reads a task from its file, but knows a group only by its name.
            names = [groups.get(file, str(file)) for file in files[spec]] if spec in files else _names(spec, manager)
            for name in names:
                loaded += _load(name, manager)
    return loaded


def run_tasks(
    model: HarnessModel, tasks: list[Task | Group], num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The harness's own results: `results`, `groups`, `versions`, `n-shot`, `n-samples`, `configs` and so on.

    Args:
        model: to ask.
        tasks: from `load_tasks`.
        num_fewshot: examples before each question; a task that is fixed at none keeps none; None: as each task says.
        limit: documents of each task; None: all.

    Raises:
        UserError: a task runs what models write, or shows them images; a task stands in two groups.
    """
    try:
        found = TaskManager(include_defaults=False).load(tasks)
    except ValueError as error:
        raise UserError(f"--tasks: {_first_line(error)}: give each task once") from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{name} runs code that a model writes, which is not supported: leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name} shows images, which this model cannot read: leave it out")
        shots = task.get_config("num_fewshot")
        if num_fewshot is not None and shots != 0:
            shots = num_fewshot
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SEED)
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    with _quiet():
        results = evaluate(model, found, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    assert results is not None, "there is one process"
    return dict(results)


def _files(spec: str) -> list[Path]:
    """Task files that a path stands for: itself; the groups in a folder, or where it has none, all its tasks."""
    path = Path(spec).expanduser()
    if path.is_file():
        return [path.absolute()]
    found = sorted(path.absolute().glob("*.yaml"))
    if not found:
        raise UserError(f"--tasks={spec}: no such task file or folder of task files: give .yaml files")
    return [file for file in found if _group(file)] or found


def _values(file: Path, key: str) -> list[str]:
    """What a task file says of a key; read as text, because its tags name Python code."""
    return re.findall(rf"^{key}:\s*(\S+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)


def _group(file: Path) -> str | None:
    """The name of the group that a file describes."""
    return next(iter(_values(file, "group")), None)


def _names(spec: str, manager: TaskManager) -> list[str]:
    if found := manager.match_tasks([spec]):
        return found
    near = difflib.get_close_matches(spec, manager.all_tasks, 3)
    raise UserError(
        f"--tasks={spec}: the harness has no such task"
        + (f"; close matches: {', '.join(near)}" if near else "")
        + ": give one that it has, or a task file (.yaml)"
    )


def _is_local(file: Path) -> bool:
    """Whether a task file reads its data only from local files."""
    paths = _values(file, "dataset_path")
    return bool(paths) and all(path in LOCAL_FORMATS or Path(path).exists() for path in paths)


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    try:
        found = manager.load([name])
    except Exception as error:  # of templates, data sets, the hub's client, metrics: any
        reason = f"{name}: the task cannot be loaded ({type(error).__name__}: {_first_line(error)})"
        if isinstance(error, ConnectionError):
            raise UserError(
                f"{reason}: the Hugging Face hub cannot be reached: fix the network, or give a task file with "
                "data_files of its own"
            ) from error
        raise UserError(f"{reason}: fix the task's file, its data or the network") from error
    if groups := list(found["groups"].values()):
        return groups[:1]  # its own; the others stand in it
    return list(found["tasks"].values())


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """The hub's client; where the hub is out of reach it says so at once, and what it has cached still serves."""
    modules: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before):
        try:
            huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS_FOR_HUB)
        except Exception:  # one of several HTTP libraries'
            for module in modules:
                module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness and its libraries print and log; a model's own bar is on the screen that it found."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
