"""Check this project on a GPU: ``tools/gpu_check.sh``."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

from gpu_check.report import finite, machine, markdown
from gpu_check.sections import SECTIONS, Result, run_section
from moe_mamba.command_line import run_command
from moe_mamba.errors import RunStopped, UserError

ROOT = Path(__file__).resolve().parents[2]


def main(
    device: Literal["cuda", "cpu"] = "cuda", only: str | None = None, output: str | None = None, tiny: bool = False
) -> None:
    """Run every section, and write a report in Markdown and JSON.

    Args:
        device: cpu tries the sections where there is no GPU, with --tiny.
        only: sections to run, separated by commas; None: all.
        output: folder of the report; None: $OUT, or else docs/measurements.
        tiny: sizes so small that the figures mean nothing.
    """
    names = [section.name for section in SECTIONS]
    chosen = only.split(",") if only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"--only={only}: no section is called {unknown[0]!r}: choose among {', '.join(names)}")
    if device == "cpu" and not tiny:
        raise UserError("--device=cpu is for trying the sections: add --tiny")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: run this on a machine that has one, or give --device=cpu --tiny")
    folder = Path(output or os.environ.get("OUT") or ROOT / "docs" / "measurements")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for section in SECTIONS:
        if section.name in chosen:
            print(f"{section.title} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
                results.append(run_section(section, ROOT, device, tiny, Path(work)))
            print(f"    {results[-1].outcome}, {results[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            _write(folder, results, device)
    failed = [result.name for result in results if result.outcome in ("failed", "out of time")]
    print(f"report: {folder / 'gpu_check.md'}")
    if failed:
        raise RunStopped(f"some sections failed: {', '.join(failed)}; see {folder / 'gpu_check.md'}")


def _write(folder: Path, results: list[Result], device: str) -> None:
    """Write what there is so far, so that a machine that is taken away leaves it behind."""
    about = machine(device, ROOT)
    content = {"machine": about, "sections": [result.as_json() for result in results]}
    text = json.dumps(finite(content), indent=1, allow_nan=False)
    (folder / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
    (folder / "gpu_check.md").write_text(markdown(about, results), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
