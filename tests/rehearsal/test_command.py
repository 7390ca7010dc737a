"""``tools/rehearse.py`` as its user calls it."""

import contextlib
import io
import json
import subprocess
import sys
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
