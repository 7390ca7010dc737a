"""Compare two checkouts of this project: a refactor must move no loss, no weight and no export by a bit.

Where a change moves the order of sums, ``--within`` says how far values may be apart, relative to the largest of their
tensor where that is above 1.

Each checkout trains the same tiny models with its own code, in processes of its own: fp32 on the CPU, one thread, the
built-in corpus. Kernels for GPUs and bf16 are not looked at.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from safetensors.torch import load_file

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.retention import name_of
from moe_mamba.command_line import run_command
from moe_mamba.config_types import Range
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.run.metrics import read_metrics

PATTERNS = "M,ME,M-,*-,*E,MEM-*E"  # the paper's five architectures, and all kinds of layers in one
RESUMED = 10  # steps, the last ones, that the code of after also makes from a checkpoint of before
TINY: dict[str, dict[str, Any]] = {
    "model": {"repeat": 1, "d_model": 32, "d_state": 8, "heads": 4, "kv_heads": 2, "vocab_size": 257},
    "moe": {"experts": 4, "d_expert": 32},
    "data": {"train": ["builtin"], "tokenizer": "bytes", "sequence_length": 64, "max_documents": 200},
    "train": {"global_batch": 8, "micro_batch": 4, "validate_every": 0, "validation_batches": 1, "sample_tokens": 0},
}


@dataclass(frozen=True)
class Layout:
    """Processes, and how tensors and experts are sharded over them."""

    name: str
    processes: int = 1
    tensor: int = 1
    expert: int = 1


LAYOUTS = {"single": Layout("1 process"), "tp2_ep2": Layout("TP 2 x EP 2", processes=2, tensor=2, expert=2)}


class Checkout:
    """The code of one side; its commands run in processes that import its package and no other.

    Args:
        path: the checkout's root.

    Attributes:
        commit: that was checked out at the start, with a + where files differ from it; None outside a repository.

    Raises:
        UserError: it is no checkout of this project.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        if not (self.path / "launch" / "train.py").is_file():
            raise UserError(f"{path} has no launch/train.py: give the root of a checkout")
        imported = self._call("-c", "import moe_mamba; print(moe_mamba.__file__)").strip()
        if Path(imported).resolve().parents[1] != self.path:
            raise UserError(f"{path}: Python imports {imported} instead: give the root of a checkout")
        git = ["git", "--no-optional-locks", "-C", str(self.path)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        self.commit = head.stdout.strip() + "+" * bool(changes.stdout) if head.returncode == 0 else None

    def train(self, config: Path, folder: Path, processes: int) -> None:
        """Train in ``folder``, or go on there from its newest checkpoint; shards of corpora are kept beside it."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        flags = [f"--config={config}", f"--run.folder={folder}", f"--data.cache={folder.parent / 'cache'}"]
        self._call(*(launcher if processes > 1 else ()), "launch/train.py", *flags)

    def export(self, folder: Path, output: Path) -> None:
        """Write the newest checkpoint of a run as a folder for Transformers."""
        self._call("tools/convert_to_hf.py", f"--checkpoint={folder}", f"--output={output}")

    def _call(self, *arguments: str) -> str:
        """What Python prints in this checkout; RunStopped where it fails."""
        environment = os.environ | {
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # what is compared stays as it is
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            raise RunStopped(f"in {self.path}, python {' '.join(arguments)} exited with code {done.returncode}")
        return done.stdout


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how many values or tensors of it there are.

    Attributes:
        difference: the first that is not allowed; None: all are equal, or near enough.
        largest: how far values are apart at most, as in `main`; 0: equal to the bit.
    """

    pattern: str
    layout: str
    what: str
    count: int
    difference: str | None
    largest: float

    def __str__(self) -> str:
        result = f"within {self.largest:.1e}" if self.largest else "equal"
        if self.difference is not None:
            result = f"DIFFERS: {self.difference}"
        return f"{self.pattern:<8}{self.layout:<13}{self.what:<12}{self.count:>4} compared: {result}"


def main(
    before: str,
    after: str,
    steps: Annotated[int, Range(2, 10**9)] = 50,
    patterns: str = PATTERNS,
    layouts: str = "single,tp2_ep2",
    output: str | None = None,
    folder: str | None = None,
    within: Annotated[float, Range(0, 1)] = 0.0,
    **overrides: Any,
) -> None:
    """Train with the code of both and compare losses, checkpoints and exports.

    Ends with exit code 1 and a line that names the first difference where there is one.

    Args:
        before: root of the checkout that gives the truth.
        after: root of the checkout that is to do the same.
        steps: of each run; the last 10 are also made by the code of after, from a checkpoint of before.
        patterns: of the models, with commas between them.
        layouts: single, tp2_ep2 (tensor 2 without expert 2 where a pattern has no experts), or both.
        output: file to write the comparisons to, as JSON.
        folder: a new folder that keeps the runs; by default they are removed at the end.
        within: how far values may be apart, relative to their tensor's largest where that is above 1; 0: not at all.
        overrides: any key of the configuration, for all runs, such as --moe.balance=bias.
    """
    if unknown := [name for name in layouts.split(",") if name not in LAYOUTS]:
        raise UserError(f"--layouts={layouts}: no layout is called {unknown[0]!r}: choose among {', '.join(LAYOUTS)}")
    if folder and Path(folder).exists():
        raise UserError(f"--folder={folder} already exists: give a new one, so that no run resumes an old one")
    sides = Checkout(before), Checkout(after)
    found = []
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as work:
        for pattern in patterns.split(","):
            for layout in layouts.split(","):
                found_here = compare(*sides, Path(work).resolve(), pattern, LAYOUTS[layout], steps, overrides, within)
                for comparison in found_here:
                    print(comparison, flush=True)
                    found.append(comparison)
    if output is not None:
        record = {
            "before": sides[0].commit,
            "after": sides[1].commit,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "steps": steps,
            "within": within,
            "overrides": overrides,
            "comparisons": [vars(comparison) for comparison in found],
        }
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if different := [comparison for comparison in found if comparison.difference]:
        first = different[0]
        raise RunStopped(
            f"{len(different)} of {len(found)} comparisons differ, the first in the {first.what} of {first.pattern}, "
            f"{first.layout}: {first.difference}"
        )
    largest = max(comparison.largest for comparison in found)
    print(f"{f'within {largest:.1e}' if largest else 'equal'} in all {len(found)} comparisons, {steps} steps per run")


def compare(
    before: Checkout,
    after: Checkout,
    work: Path,
    pattern: str,
    layout: Layout,
    steps: int,
    overrides: Mapping[str, Any],
    within: float = 0.0,
) -> Iterator[Comparison]:
    """Train a pattern in a layout with both, and compare what they leave.

    Args:
        before: gives the truth.
        after: is to do the same.
        work: folder of all runs; corpora that are sharded there already are used again.
        pattern: of the model.
        layout: of the processes.
        steps: of each run, 2 or more.
        overrides: key, such as ``moe.balance``, -> value.
        within: how far values may be apart, as in `main`.
    """

    def comparison(what: str, truth: dict[str, Any], found: dict[str, Any]) -> Comparison:
        difference, largest = compare_values(truth, found, within)
        return Comparison(pattern, layout.name, what, len(truth), difference, largest)

    saved = steps - min(RESUMED, steps // 2)
    name = f"{pattern.replace('*', 'A')}_{layout.processes}"
    config = work / f"{name}.yaml"
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(_config(pattern, layout, steps, saved, overrides)), encoding="utf-8")
    first, second, resumed = work / "before" / name, work / "after" / name, work / "after" / f"{name}_resumed"

    before.train(config, first, layout.processes)
    after.train(config, second, layout.processes)
    figures, tensors = _figures(first), _checkpoint(first)
    yield comparison("losses", figures, _figures(second))
    yield comparison("checkpoint", tensors, _checkpoint(second))

    shutil.copytree(first, resumed, ignore=shutil.ignore_patterns(name_of(steps), "best.json", "metrics.jsonl"))
    after.train(config, resumed, layout.processes)
    yield comparison("resume", _figures(first, saved) | tensors, _figures(resumed) | _checkpoint(resumed))

    before.export(first, first / "export")
    after.export(second, second / "export")
    yield comparison("export", _export(first / "export"), _export(second / "export"))


def compare_values(
    before: Mapping[str, Any], after: Mapping[str, Any], within: float = 0.0
) -> tuple[str | None, float]:
    """Compare values and tensors by name.

    Returns:
        What differs first by more than `within`, None where nothing does; and the largest difference of all.
    """
    first, largest = None, 0.0
    for name, value in before.items():
        if name not in after:
            return f"{name} is missing after", largest
        words, distance = _difference(value, after[name])
        largest = max(largest, distance)
        if first is None and words and not distance <= within:
            first = f"{name} {words}"
    return first or next((f"{name} is new after" for name in after if name not in before), None), largest


def _difference(before: Any, after: Any) -> tuple[str | None, float]:
    """Words for a difference, None for none; and how large it is, infinite where that makes no sense."""
    if not isinstance(before, torch.Tensor):
        distance = 0.0 if before == after else math.inf
        if distance and isinstance(before, float) and isinstance(after, float):
            distance = abs(before - after) / max(1.0, abs(before))
        return f"is {before!r} before and {after!r} after" if distance else None, distance
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        kinds = [f"{tensor.dtype} of {tuple(tensor.shape)}" for tensor in (before, after)]
        return f"is {kinds[0]} before and {kinds[1]} after", math.inf
    bits = [tensor.reshape(-1).view(torch.uint8).view(-1, tensor.itemsize) for tensor in (before, after)]
    count = int((bits[0] != bits[1]).any(1).sum())
    if not count:
        return None, 0.0
    largest = float((before.double() - after.double()).abs().max())
    words = f"differs in {count:,} of {before.numel():,} values, by at most {largest:.2e}"
    if not largest:  # -0.0 is none of 0.0's bits
        return words, math.ulp(0.0)
    return words, largest / max(1.0, float(before.double().abs().max()))


def _config(
    pattern: str, layout: Layout, steps: int, saved: int, overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The configuration's tree; all keys that it leaves out are each checkout's defaults."""
    tree = {section: dict(values) for section, values in TINY.items()}
    tree["model"]["pattern"] = pattern
    tree["train"]["steps"] = steps
    tree["checkpoint"] = {"every": saved}
    tree["parallel"] = {"tensor": layout.tensor, "expert": layout.expert if "E" in pattern else 1}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _figures(folder: Path, after: int = 0) -> dict[str, float]:
    """Loss, gradient's norm and the other figures of each step of a run past ``after``, but for its speed."""
    return {
        f"{name} of step {line['step']}": value
        for line in read_metrics(folder)
        if line["step"] > after
        for name, value in line.items()
        if isinstance(value, float) and name not in ("tokens_per_second", "tflops", "mfu")
    }


def _checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of a run's newest checkpoint: weights, optimizer's state, biases."""
    step = store.resolve(folder)
    return {name: store.read_tensor(step, name) for name in store.logical_tensors(step)}


def _export(folder: Path) -> dict[str, Any]:
    """Every tensor of an exported model, and every key of its config.json."""
    content = {f"config.json: {key}": value for key, value in json.loads((folder / "config.json").read_text()).items()}
    for file in sorted(folder.glob("*.safetensors")):
        content |= load_file(file)
    return content


if __name__ == "__main__":
    run_command(main)
