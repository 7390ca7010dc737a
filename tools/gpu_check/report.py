"""The report of a check, in Markdown."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import Row, table
from benchmarks.profiling import Profile
from gpu_check.sections import Result

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "mamba-ssm", "causal-conv1d")


def machine(device: str, root: Path) -> dict[str, Any]:
    """What the check ran on, and which commit."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(root),
        "device": "CPU, tiny: the figures mean nothing",
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        about["compute capability"] = f"{properties.major}.{properties.minor}"
        about["CUDA"] = torch.version.cuda
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    return about


def finite(content: Any) -> Any:
    """The same lists, dictionaries and values, with None for every number that JSON does not have."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _commit(root: Path) -> str:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def markdown(about: dict[str, Any], results: list[Result]) -> str:
    """The whole report."""
    parts = [
        "# Check on a GPU",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        "\n".join(
            ["| section | outcome | seconds |", "|---|---|---|"]
            + [f"| {result.title} | {result.outcome} | {result.seconds:.0f} |" for result in results]
        ),
    ]
    for result in results:
        parts.append(f"## {result.title}")
        show = SHOWN.get(result.name, _benchmark)
        if result.data:
            parts.append(show(result.data))
        if result.outcome.startswith("skipped"):
            parts.append(f"{result.outcome[0].upper()}{result.outcome[1:]}.")
        elif result.outcome != "passed" or result.name == "tests":
            parts.append("\n".join(["```", *(result.log if result.outcome != "passed" else result.log[-1:]), "```"]))
    return "\n\n".join(parts) + "\n"


def _benchmark(data: dict[str, Any]) -> str:
    parts = []
    measured = {name: value for name, value in data["machine"].items() if name.endswith(("_second", "_flops"))}
    if measured:
        rates = (f"{name.replace('_', ' ')} {value / 1e12:.2f} T" for name, value in measured.items())
        parts.append(f"Measured on plain work: {', '.join(rates)}.")
    known = {field.name for field in fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in data["rows"]]
    if rows:
        parts.append(table(rows))
    parts += [Profile(**one).table() for one in data["profiles"]]
    return "\n\n".join(parts)


def _kernels(data: dict[str, Any]) -> str:
    lines = ["| operation | back end | dtype | largest error | allowed | of |", "|---|---|---|---|---|---|"]
    for row in data["rows"]:
        if fault := row["broken"] or row["refused"]:
            cells = ["**broken**" if row["broken"] else "refused", "", fault.partition("\n")[0].replace("|", "/")]
        else:
            cells = [f"{row['error']:.1e}{'' if row['passed'] else ' **too large**'}", f"{row['allowed']:g}", row["of"]]
        lines.append(f"| {' | '.join([row['operation'], row['backend'], row['dtype'], *cells])} |")
    return "\n".join(lines)


def _training(data: dict[str, Any]) -> str:
    lines = ["| what | figure |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in data["shown"].items()])


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {"kernels": _kernels, "training": _training}
