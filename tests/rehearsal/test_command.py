"""``tools/rehearse.py`` as its user calls it."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.commands.rehearse import main
from tests import ROOT
from tests.rehearsal.process import Rehearsals

SMALL = {"model.repeat": "1", "model.d_model": "64", "model.d_ff": "128", "moe.d_expert": "128", "model.heads": "8"}
SMALL |= {"model.kv_heads": "4", "model.vocab_size": "512", "data.sequence_length": "64", "train.global_batch": "256"}
SMALL |= {"train.micro_batch": "1"}


def printed(**flags: Any) -> str:
    """In the process: what the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(**flags)
    return said.getvalue()


def test_the_table_and_the_json(rehearsals: Rehearsals, tmp_path: Path) -> None:
    config, path = str(ROOT / "configs/scale/jamba_52b.yaml"), tmp_path / "rank.json"
    said = rehearsals.run(printed, config=config, gpus="1024", rank=17, json=str(path), **SMALL)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert "micro-batch           1 sequences" in said
    assert "16 x sizes of an exchange" not in said  # 4 of its 8 layers have experts
    assert " 4 x sizes of an exchange, moe_mamba/parallel/expert.py" in said
    assert f"{len(found['collectives']):,} a step" in said
    assert found["memory"]["total"] == sum(found["memory"]["peak"].values())
    assert {len(one["group"]) for one in found["collectives"]} == {4, 16, 64, 256, 1024}
    assert all(one["place"] for one in found["collectives"])
    (matrix,) = {str(matrix) for matrix in found["sends"].values()}
    assert len(json.loads(matrix)) == len(json.loads(matrix)[0]) == 16


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--gpus=2 --ranks=0", "--ranks=0 compares nothing: give several ranks, or --rank=0"),
        ("--gpus=2 --ranks=0,0", "--ranks=0,0 compares nothing"),
        ("--gpus=2 --ranks=0,2", "--ranks=2: 2 GPUs have ranks from 0 to 1"),
        ("--gpus=2 --ranks=", "--ranks= is no number"),
        ("--gpus=1 --rank=1", "--rank=1: 1 GPUs have ranks from 0 to 0"),
        ("--gpus=16 --gpus_per_machine=5", "--gpus=16 is no whole number of machines of 5: give 15"),
        ("--gpus=99999999", "--gpus=99999999 must be from 1 to 131,072"),
        ("--gpus=1 --gpu=v100", "--gpu=v100 is not known: choose one of a100-80, h100"),
        ("--gpus=1 --json=nowhere/x.json", "there is no folder"),
        ("--gpus=1 --json=", "--json=: give a file that ends in .json"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(refusal: Callable[..., str], flags: str, line: str) -> None:
    assert line in refusal(main, *flags.split())


@pytest.mark.slow
def test_52_billion_parameters_in_two_minutes_and_four_gib() -> None:
    """Minutes of a processor, so that other work does not count (32 s on an idle core)."""
    code = (
        "import resource, sys; sys.argv[0] = 'rehearse.py'; import tools.rehearse as tool; "
        "from moe_mamba.command_line import run_command; run_command(tool.main); "
        "used = resource.getrusage(resource.RUSAGE_SELF); print('used', used.ru_utime, used.ru_maxrss)"
    )
    flags = ["--gpus", "1024", "--rank", "17", "--train.micro_batch=1", "--train.global_batch=256"]
    command = [sys.executable, "-c", code, "--config", str(ROOT / "configs/scale/jamba_52b.yaml"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory at its peak" in done.stdout
    _, seconds, kilobytes = done.stdout.rsplit(maxsplit=2)
    assert float(seconds) < 120
    assert int(kilobytes) < 4 * 2**20
