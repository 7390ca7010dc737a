import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_mamba.data.shards import Shards
from tests import ROOT
from tests.data.conftest import write_documents
from tools.preprocess_c4 import main


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "preprocess_c4.py", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_c4_through_gpt2(shared_data: Path, tmp_path: Path) -> None:
    source = f"{shared_data}/c4/en/c4-train*.json.gz"
    command = ("--input", source, "--tokenizer", shared_data / "gpt2", "--output", tmp_path / "c4", "--workers", 2)
    done = run(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,727 documents, 791,101 tokens" in done.stdout  # 789,374, and an end-of-text per document
    again = run(*command)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert Shards.open(tmp_path / "c4", verify="checksums").documents == 1727


def test_rejects_are_said(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one", "two", ""])
    done = run("--input", source, "--tokenizer=bytes", "--output", tmp_path / "out", "--workers=1")
    assert done.returncode == 0
    assert "2 documents, 8 tokens" in done.stdout
    assert done.stderr.splitlines() == [f"1 damaged lines or files are kept in {tmp_path / 'out' / 'rejects.jsonl'}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input=missing*.json.gz", "--tokenizer=bytes"), "no such file"),
        (("--input=builtin", "--tokenizer=nothing"), "no such tokenizer"),
        (("--input=builtin", "--tokenizer=bytes", "--workers=0"), "--workers=0"),
        (("--input=builtin", "--tokenizer=bytes", "--workers=-1"), "--workers=-1"),
        (("--input=builtin", "--tokenizer=bytes", "--limit=x"), "--limit=x"),
    ],
)
def test_bad_input_is_one_line(
    refusal: Callable[..., str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refusal(main, *arguments, f"--output={tmp_path / 'out'}")


def test_another_field_holds_the_text(
    refusal: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"url": "x", "content": "some text"}\n' * 3000)
    flags = (f"--input={tmp_path / 'a.jsonl'}", "--tokenizer=bytes", f"--output={tmp_path / 'out'}", "--workers=1")
    line = refusal(main, *flags)
    assert "no document in the first 1,000 records (a.jsonl, line 1: no field text" in line
    assert "there: url, content): name the field of the text with --text_key" in line and len(line) < 300
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 1000
    main(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "bytes", 1, text_key="content")
    assert "3,000 documents, 30,000 tokens" in capsys.readouterr().out
    assert "holds shards of another source" in refusal(main, *flags)
