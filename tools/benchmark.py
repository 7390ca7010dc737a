"""Measure this project against its peers: ``python tools/benchmark.py``.

Speed depends on the machine and on its neighbours, so every figure is a ratio from one run: ours and theirs take
turns, and the median of the ratios of the pairs is reported. What is measured stands in tools/benchmarks/.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from benchmarks.pairs import Row, table
from benchmarks.profiling import Profile
from moe_mamba.command_line import run_command
from moe_mamba.config_types import Positive
from moe_mamba.errors import UserError

CPU_ROWS: tuple[str, ...] = ("scan", "step", "head", "prefill", "decode", "context", "profile")
CPU_ROWS += ("moe", "designs", "scaling", "plan", "preprocess")
BEFORE_ROWS = ("step_before", "decode_before", "head_before", "startup_before")
GPU_ROWS = ("gpu_scan", "gpu_conv", "gpu_moe", "gpu_step", "gpu_profile")


def main(
    only: str | None = None,
    output: str | None = None,
    repeats: Positive = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    documents: str = "builtin",
    tokenizer: str = "sentencepiece",
    before: str | None = None,
    tiny: bool = False,
) -> None:
    """Compare with the peers found here, and print a table; a peer that is not installed leaves a gap in it.

    Args:
        only: rows to measure, separated by commas: of scan, step, head, prefill, decode, context, profile, moe,
            designs, scaling, plan and preprocess; with --before of step_before, decode_before, head_before and
            startup_before; on a GPU of gpu_scan, gpu_conv, gpu_moe, gpu_step and gpu_profile. None: all of these.
        output: file to write the rows to as well, as JSON.
        repeats: pairs of measurements a row.
        device: cuda measures a GPU's kernels and steps.
        documents: what preprocess reads, in the syntax of data.train; builtin is taken 20 times over.
        tokenizer: what preprocess encodes with: gpt2, bytes, a folder, a .model file, or sentencepiece to train one.
        before: folder with an older checkout of this project, against which the rows named so are measured on a CPU.
        tiny: shapes so small that the figures mean nothing, to try the tool; the GPU's rows then run on a CPU too.
    """
    chosen = _choose(only, device, before, tiny)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no GPU: leave it out")
    measured: list[Row | Profile] = []
    for name in chosen:
        if name in BEFORE_ROWS and before is not None:
            measured += _measure_before(name, Path(before), tiny, repeats)
        else:
            measured += _measure(name, repeats, device, documents, tokenizer, tiny)
    rows = [one for one in measured if isinstance(one, Row)]
    profiles = [one for one in measured if isinstance(one, Profile)]
    print("\n\n".join(([table(rows)] if rows else []) + [one.table() for one in profiles]))
    if output is not None:
        content = {
            "machine": _machine(device),
            "rows": [asdict(row) for row in rows],
            "profiles": [asdict(one) for one in profiles],
        }
        Path(output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _choose(only: str | None, device: str, before: str | None, tiny: bool) -> list[str]:
    """Names of the rows to measure.

    Raises:
        UserError: one that does not exist, or that has nothing to be measured against.
    """
    usual = GPU_ROWS if device == "cuda" else CPU_ROWS + BEFORE_ROWS * (before is not None)
    known = GPU_ROWS if device == "cuda" else CPU_ROWS + BEFORE_ROWS + GPU_ROWS * tiny
    chosen = only.split(",") if only else list(usual)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"--only={only}: no row is called {unknown[0]!r}: choose among {', '.join(known)}")
    against = [name for name in chosen if name in BEFORE_ROWS]
    if against and before is None:
        raise UserError(
            f"--only={only}: {against[0]} needs --before=FOLDER: make one with git worktree add --detach FOLDER COMMIT"
        )
    if before is not None:
        from benchmarks.before import check_checkout

        check_checkout(Path(before))
        if not against:
            rows = f"--only={only}" if only else f"--device={device}"
            raise UserError(f"--before={before}: no row of {rows} needs it: leave it out, or choose {BEFORE_ROWS[0]}")
    return chosen


def _measure_before(name: str, folder: Path, tiny: bool, repeats: int) -> Sequence[Row]:
    from benchmarks import before

    if name == "startup_before":
        return before.startup_rows(folder, repeats)
    rows = {"step_before": before.step_rows, "decode_before": before.decode_rows, "head_before": before.head_rows}
    return rows[name](folder, before.BeforeShapes.choose(tiny), repeats)


def _measure(
    name: str, repeats: int, device: str, documents: str, tokenizer: str, tiny: bool
) -> Sequence[Row | Profile]:
    """What ``name`` stands for; imports only what it needs."""
    if name == "scan":
        from benchmarks.scan import ScanShapes, scan_rows

        return scan_rows(ScanShapes.choose(tiny), repeats)
    if name in ("step", "profile"):
        from benchmarks import step

        shapes = step.StepShapes.choose(tiny)
        if name == "profile":
            return [step.step_profile(shapes)]
        return [step.step_row(shapes, repeats), step.bf16_row(tiny, repeats)]
    if name == "head":
        from benchmarks import head, step

        return head.head_rows(head.HeadShapes.choose(tiny), step.StepShapes.choose(tiny), repeats)
    if name in ("prefill", "decode", "context"):
        from benchmarks import generation

        measure = {"prefill": generation.prefill_rows, "decode": generation.decode_rows}
        return measure.get(name, generation.context_rows)(generation.GenerationShapes.choose(tiny), repeats)
    if name == "moe":
        from benchmarks.moe import MoEShapes, moe_rows

        return moe_rows(MoEShapes.choose(tiny), repeats)
    if name == "designs":
        from benchmarks import designs

        return designs.designs(designs.DesignShapes.choose(tiny), repeats)
    if name == "scaling":
        from benchmarks.scaling import ScalingShapes, scaling_rows

        return scaling_rows(ScalingShapes.choose(tiny), repeats)
    if name == "plan":
        from benchmarks.plan import PlanShapes, plan_rows

        return plan_rows(PlanShapes.choose(tiny))
    if name == "preprocess":
        from benchmarks.preprocess import preprocess_row

        return [preprocess_row(documents, tokenizer, tiny, repeats)]
    return _gpu(name)(torch.device(device), tiny, repeats)


def _gpu(name: str) -> Callable[[torch.device, bool, int], list[Row] | list[Profile]]:
    if name in ("gpu_scan", "gpu_conv"):
        from benchmarks import gpu_scan

        return gpu_scan.scan_rows if name == "gpu_scan" else gpu_scan.conv_rows
    if name == "gpu_moe":
        from benchmarks.gpu_moe import moe_rows

        return moe_rows
    from benchmarks import gpu_step

    return gpu_step.step_rows if name == "gpu_step" else gpu_step.step_profile


def _machine(device: str) -> dict[str, object]:
    machine: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        from benchmarks.gpu_clock import rates

        machine |= {"gpu": torch.cuda.get_device_name(), **asdict(rates(torch.device(device)))}
    return machine


if __name__ == "__main__":
    run_command(main)
