"""The sections of the check, and how one runs: in a process of its own, for as long as it may."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GRACE = 15  # seconds that a section out of time has to end by itself
TAIL = 25  # lines of a section's log that the report shows


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: on the command line.
        title: in the report.
        limit: seconds it may take; all of them together stay under 9 minutes.
        command: after ``python``; ``{device}``, ``{output}`` (a JSON file) and ``{work}`` (a folder) are filled in.
        full: flags of the check itself.
        tiny: flags that make it tiny, for a CPU.
        needs: packages without which it is skipped.
    """

    name: str
    title: str
    limit: int
    command: tuple[str, ...]
    full: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ("--tiny",)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a section came to.

    Attributes:
        name: of the section.
        title: of the section.
        outcome: ``passed``, ``failed``, ``out of time``, or ``skipped: `` and the reason.
        seconds: it took.
        data: what it measured; empty where it wrote nothing.
        log: the end of what it said.
    """

    name: str
    title: str
    outcome: str
    seconds: float
    data: dict[str, Any]
    log: list[str]

    def as_json(self) -> dict[str, Any]:
        """For the JSON report, the log without lines of progress."""
        return asdict(self)


def _benchmark(name: str, title: str, limit: int, repeats: int) -> Section:
    command = ("tools/benchmark.py", f"--only={name}", "--device={device}", "--output={output}")
    return Section(name, title, limit, command, full=(f"--repeats={repeats}",), tiny=("--tiny", "--repeats=1"))


SECTIONS = (
    Section(
        "kernels",
        "Kernels against float64, at a model's sizes",
        50,
        ("-m", "gpu_check.kernels", "--device={device}", "--output={output}"),
    ),
    Section(
        "tests",
        "The kernels' tests on the device",
        110,
        # The fixtures of the other tests are left out: they need packages that kernels do not.
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/kernels"),
        full=("-m", "gpu and not long", "tests/kernels"),
        tiny=("-m", "not gpu", "tests/kernels/test_vendor.py"),
        needs=("pytest",),
    ),
    _benchmark("gpu_scan", "Speed of the scan", 40, 9),
    _benchmark("gpu_conv", "Speed of the convolution", 30, 9),
    _benchmark("gpu_moe", "Speed of a layer of experts", 50, 7),
    _benchmark("gpu_step", "Speed of a training step", 55, 5),
    _benchmark("gpu_profile", "Where the time of a step goes", 40, 1),
    Section(
        "training",
        "A training run of configs/paper/moe_mamba_25m.yaml",
        140,
        ("-m", "gpu_check.training", "--device={device}", "--output={output}", "--work={work}"),
        needs=("deepspeed", "megatron", "matplotlib", "safetensors", "tokenizers", "tqdm", "xxhash"),
    ),
)


def run_section(section: Section, root: Path, device: str, tiny: bool, work: Path) -> Result:
    """Run a section from the folder ``root``, with files of its own in ``work``; never fails itself."""
    for package in section.needs:
        if find_spec(package) is None:
            return Result(section.name, section.title, f"skipped: {package} is not installed", 0.0, {}, [])
    output, log = work / "data.json", work / "log.txt"
    places = {"{device}": device, "{output}": str(output), "{work}": str(work)}
    command = [*section.command, *(section.tiny if tiny else section.full)]
    for place, value in places.items():
        command = [argument.replace(place, value) for argument in command]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begin = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        outcome = _wait(process, section.limit)
    data = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    lines = [line.rpartition("\r")[2] for line in log.read_bytes().decode(errors="replace").split("\n")]
    said = [line for line in lines if line.strip()][-TAIL:]
    return Result(section.name, section.title, outcome, time.monotonic() - begin, data, said)


def _wait(process: subprocess.Popen, limit: float) -> str:
    """Wait for a process that leads a session of its own; ends the whole session when the time is over."""
    try:
        return "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    except BaseException:  # such as Ctrl-C, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        raise
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "out of time"
