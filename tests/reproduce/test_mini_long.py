"""The README's own line: the whole of Table 1 in small, from the built-in text to the report."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.reproduce.independent import check_table, curve

LINE = "python tools/reproduce.py --table main --scale mini --seeds 1 --tokens 200000"
ROWS = ("transformer", "mamba_mlp", "transformer_moe", "mamba", "moe_mamba")
RATES, STEPS, OF_SWEEP = 7, 48, 7  # 200,000 tokens of 4,096 a step, and 15 % of them


@pytest.mark.long
def test_the_table_of_the_readme(tmp_path: Path) -> None:
    assert LINE in (ROOT / "README.md").read_text()
    words = [sys.executable, *shlex.split(LINE)[1:], f"--output={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "main-v1"
    table = json.loads((made / "table.json").read_text())
    assert table["missing"] == []
    for row in ROWS:
        assert len(table["rows"][row]["sweep"]) == RATES
        assert [steps for steps, _ in _curve(table, row)][-1] == STEPS
        assert _curve(table, row)[-1][1] < _curve(table, row)[0][1]
        swept = [curve(folder)[-1][0] for folder in (tmp_path / "sweep" / row).glob("rate*")]
        assert swept == [OF_SWEEP] * RATES
    check_table(tmp_path, made, dict.fromkeys(ROWS, "mamba"))
    assert (made / "tokens.png").read_bytes().startswith(b"\x89PNG")
    page = (made / "report.html").read_text()
    assert page.count("data:image/") >= 1
    assert 'src="http' not in page  # it needs no other file
    assert all(table["rows"][row]["title"] in page for row in ROWS)


def _curve(table: dict, row: str) -> list[list[float]]:
    return table["rows"][row]["seeds"]["1"]["curve"]
