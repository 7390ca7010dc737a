"""The commands that generate and evaluate, as a user starts them on several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.commands import evaluate, generate
from tests import ROOT
from tests.hf.checkpoints import make_run
from tests.parallel.output import printed
from tests.test_launch import BIN, call
from tests.world import free_port

LAYOUT = ("--parallel.tensor=2", "--parallel.expert=2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", {"pattern": "MEM-*E", "kv_heads": 2})
    return tmp_path / "run"


@pytest.mark.parametrize("flags", [{"temperature": 0, "json": True}, {"top_k": 9, "seed": 3, "stop": "a"}], ids=str)
def test_prompts_of_a_file_are_shared_and_printed_once_in_order(
    world: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any]
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in range(1, 6)))
    flags |= {"prompts_file": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 5, "batch": 3}
    generate.main(str(run), **flags)
    expected = capsys.readouterr().out
    assert expected.count("\n") == 5
    first, *others = world.run(printed, "generate", str(run), ranks=2, **flags, **{"parallel.expert": "2"})
    assert first == expected and others == [""]


@pytest.mark.slow
def test_deepspeed_generates_what_one_process_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"temperature": 0, "max_new_tokens": 9, "json": True}
    generate.main(str(run), "some text", **flags)
    launcher = (str(BIN / "deepspeed"), "--quiet", "--num_gpus=2", f"--master_port={free_port()}")
    done = call(*launcher, "tools/generate.py", str(run), "--prompt=some text", *map(flag, flags.items()), *LAYOUT)
    assert done.returncode == 0, done.stderr
    assert json_lines(done.stdout) == json_lines(capsys.readouterr().out)


@pytest.mark.slow
def test_torchrun_evaluates_as_one_process_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the cache of shards is there
    (tmp_path / "text.txt").write_text("What is to be scored, twice over. " * 40)
    flags = {"input": str(tmp_path / "text.txt"), "sequence_length": 21, "batch": 3, "json": True}
    evaluate.main(str(run), **flags)
    (expected,) = json_lines(capsys.readouterr().out)
    launcher = (str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}")
    done = call(*launcher, "tools/evaluate.py", str(run), *map(flag, flags.items()), *LAYOUT)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5) and found["tokens"] == expected["tokens"]


def flag(pair: tuple[str, Any]) -> str:
    return f"--{pair[0]}={pair[1]}"


def json_lines(output: str) -> list[dict[str, Any]]:
    """What a launcher says besides is left out."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def start(size: int, *flags: str) -> list[subprocess.Popen[str]]:
    """Processes with a launcher's variables, but no launcher that would end the others when one ends."""
    variables = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-u", "tools/generate.py", *flags],
            cwd=ROOT,
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.mark.slow
def test_what_only_the_first_rank_finds_ends_all_with_code_2(tmp_path: Path) -> None:
    ranks = start(2, str(tmp_path / "nowhere"), "--prompt=a", *LAYOUT)
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said[0][1].startswith("error: ") and said[0][1].count("\n") == 1 and "nowhere" in said[0][1]
    assert said[1] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_gone_or_stands_still_ends_the_others(run: Path, end: signal.Signals) -> None:
    length = ("--max_new_tokens=1000000", "--min_new_tokens=1000000")
    ranks = start(2, str(run), "--prompt=a", *length, "--parallel.timeout=8", *LAYOUT)
    assert ranks[0].stdout is not None and ranks[0].stdout.read(3)  # it writes
    ranks[1].send_signal(end)
    _, error = ranks[0].communicate(timeout=100)
    assert ranks[0].returncode == 1
    assert error.startswith("error: another rank is gone") and error.count("\n") == 1
    ranks[1].kill()
    ranks[1].communicate()
