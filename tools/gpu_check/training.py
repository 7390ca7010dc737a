"""The check's section ``training``: a few hundred steps of the paper's MoE-Mamba 25M through launch/train.py."""

import json
import math
import runpy
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_clock import Rates, rates
from gpu_check.report import finite
from moe_mamba.atomic_file import write_atomically
from moe_mamba.command_line import run_command
from moe_mamba.config_file import load_config
from moe_mamba.errors import RunStopped
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.planning.devices import peak_flops
from moe_mamba.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "paper" / "moe_mamba_25m.yaml"
STEPS = 200
INTERVAL = 5.0  # seconds between two writings of the figures
WARM_UP = 0.1  # share of the steps that the speed is not taken from
TINY = {
    "model.repeat": 1,
    "model.d_model": 32,
    "moe.experts": 4,
    "moe.d_expert": 32,
    "data.sequence_length": 32,
    "data.max_documents": 20,
    "train.global_batch": 4,
    "train.precision": "fp32",
}


def main(output: str, work: str, device: str = "cuda", tiny: bool = False, steps: int | None = None) -> None:
    """Train, and write down speed, MFU, peak memory and the curve.

    Args:
        output: JSON file.
        work: folder for the run and its corpus.
        device: what the figures are of.
        tiny: a model and a run that only show that this works.
        steps: of the run.
    """
    reached = rates(torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = steps or (3 if tiny else STEPS)
    folder = Path(work) / "run"
    overrides: dict[str, Any] = {
        **corpus(),
        "data.cache": str(Path(work) / "corpus"),
        "run.folder": str(folder),
        "train.steps": steps,
        "train.validate_every": 0,
        "train.validation_batches": 2,
        "train.sample_tokens": 0,
        "checkpoint.every": 0,
        **(TINY if tiny else {}),
    }
    begin = time.monotonic()

    def write() -> None:
        if (folder / "metrics.jsonl").exists():
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            content = figures(folder, overrides, reached, peak, time.monotonic() - begin, device)
            write_atomically(Path(output), json.dumps(finite(content), indent=1, allow_nan=False) + "\n")

    with writing(write):
        runpy.run_path(str(ROOT / "launch" / "train.py"))["train"](config=CONFIG, **overrides)
    if wrong := fault(losses(read_metrics(folder))):
        raise RunStopped(wrong)


@contextmanager
def writing(write: Callable[[], None]) -> Iterator[None]:
    """Call ``write`` every few seconds and at the end, so that a run that is killed leaves its figures behind."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(INTERVAL):
            write()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write()


def corpus() -> dict[str, str]:
    """Real C4 and GPT-2's vocabulary, where a folder of data lies in or beside this checkout; else what Python carries.

    The vocabulary stays the paper's, so that a step costs the same.
    """
    for folder in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data"):
        c4, vocabulary = folder / "c4" / "en", folder / "gpt2"
        if c4.is_dir() and vocabulary.is_dir():
            return {
                "data.train": f"{c4}/c4-train.*.json.gz",
                "data.validation": f"{c4}/c4-validation.*.json.gz",
                "data.tokenizer": str(vocabulary),
            }
    return {"data.train": "builtin", "data.validation": "builtin:validation", "data.tokenizer": "bytes"}


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Of the steps; NaN where the metrics have null."""
    found = (line["loss"] for line in lines if "tokens_per_second" in line)
    return [math.nan if loss is None else loss for loss in found]


def fault(curve: list[float]) -> str | None:
    """What is wrong with the losses of a run; None: all are numbers, and the last tenth lies below the first."""
    if not curve:
        return "the loss did not fall: the run took no step"
    tenth = max(1, len(curve) // 10)
    first, last = statistics.fmean(curve[:tenth]), statistics.fmean(curve[-tenth:])
    odd = next((loss for loss in curve if not math.isfinite(loss)), last)
    if math.isfinite(odd) and last < first:
        return None
    return f"the loss did not fall: {first:.3g} -> {odd:.3g}"


def figures(
    folder: Path, overrides: dict[str, Any], reached: Rates, peak: int, seconds: float, device: str
) -> dict[str, Any]:
    """What the run's metrics say, raw and as the report shows it."""
    config = load_config(CONFIG, overrides)
    model = LanguageModel.on_meta(config.model, config.moe)
    operations = model.flops_per_token(config.data.sequence_length)
    lines = read_metrics(folder)
    steps = [line for line in lines if "tokens_per_second" in line]
    curve = losses(lines)
    timed = [line["tokens_per_second"] for line in steps[int(WARM_UP * len(steps)) :]]
    speed = statistics.median(timed) if timed else 0.0
    sheet = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if device == "cuda" else None
    shown = {
        "steps": f"{len(steps)} of {config.train.global_batch} x {config.data.sequence_length:,} tokens",
        "data": ", ".join(config.data.train_weights),
        "tokens per second (median)": f"{speed:,.0f}",
        "operations per token": f"{operations / 1e6:,.1f} M",
        "MFU against the measured rate": f"{operations * speed / reached.bf16_flops:.1%} of "
        f"{reached.bf16_flops / 1e12:,.1f} TFLOP/s",
        "MFU against the data sheet": f"{operations * speed / sheet:.1%} of {sheet / 1e12:,.0f} TFLOP/s"
        if sheet
        else "not known for this device",
        "peak memory": f"{peak / 2**30:.1f} GiB" if peak else "not measured",
        "loss, first and last step": f"{curve[0]:.3f}, {curve[-1]:.3f}" if curve else "no step",
        "the whole run, start and saving included": f"{seconds:.0f} s",
    }
    return {
        "shown": shown,
        "tokens_per_second": speed,
        "flops_per_token": operations,
        "peak_bytes": peak,
        "bf16_flops": reached.bf16_flops,
        "data_sheet_flops": sheet,
        "losses": [round(loss, 4) for loss in curve],
        "each_tokens_per_second": [line["tokens_per_second"] for line in steps],
    }


if __name__ == "__main__":
    run_command(main)
