"""A whole small table, its runs in processes of their own: table, pictures, and the same numbers by other code."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_mamba.command_line import parse
from moe_mamba.commands.reproduce import main
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.reproduce import experiment
from tests.reproduce.independent import check_table, curve

MODEL = {"model.d_model": 8, "model.d_state": 2, "model.vocab_size": 257}
SPEC: dict[str, Any] = {
    "title": "Two models",
    "axis": "experts",
    "rows": {
        "plain": {"title": "Plain", "at": 1},
        "two": {"title": "Two experts", "at": 2},
    },
    "mini": {
        "config": "base.yaml",
        "seeds": 2,
        "one_rate": 2,
        "sweep": {"rates": [3e-3, 3e-2], "share": 0.5},
        "runs": {
            "plain": {"keys": {"model.pattern": "-", "model.repeat": 2}},
            "two": {"keys": {"model.pattern": "-E", "moe.experts": 2}},
        },
    },
    "versions": {
        "v1": {
            "source": "a test",
            "reference": "plain",
            "published": {"plain": {"loss": 3.5, "share": 1}, "two": {"loss": 3.41, "share": 0.5}},
        }
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """The output of a table of two rows and two seeds, and the flags that made it."""
    folder = tmp_path_factory.mktemp("reproduce")
    tree: dict[str, dict[str, Any]] = {
        "moe": {"d_expert": 8, "capacity_factor": None},
        "train": {"steps": 40, "global_batch": 2, "micro_batch": 2, "validation_batches": 2, "sample_tokens": 0},
        "data": {"sequence_length": 32},
        "logging": {"plots": False},
    }
    for key, value in MODEL.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    spec = SPEC | {"mini": SPEC["mini"] | {"config": str(folder / "base.yaml")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    lines = [json.dumps({"text": f"{n} plus {n % 7} is {n + n % 7}."}) for n in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--table=tiny", f"--output={folder / 'out'}", f"--data.train={folder / 'text.jsonl'}"]
    flags += ["--data.tokenizer=bytes"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "FOLDER", folder)
        _call(*flags)
        yield folder / "out", flags


def _call(*flags: str) -> None:
    """The tool, in this process; its runs are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reproduce.py", *flags])
        parse(main)()


def _submitted(folder: Path) -> list[str]:
    """What task 0 of an array gives to srun."""
    stand_in = folder / "srun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "/", "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(["bash", folder / "array.sbatch"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_table_equals_one_computed_from_raw_metrics(made: tuple[Path, list[str]]) -> None:
    output, _ = made
    found = json.loads((output / "tiny-v1" / "table.json").read_text())
    assert found["missing"] == []
    for row, said in found["rows"].items():
        tried = {rate: curve(output / "sweep" / row / f"rate{rate}")[-1] for rate in ("0.003", "0.03")}
        assert {step for step, _ in tried.values()} == {20}  # half the steps
        config = yaml.safe_load((output / "runs" / row / "seed2" / "config.yaml").read_text())
        best = float(min(tried, key=lambda rate: tried[rate][1]))
        assert config["train"]["learning_rate"] == said["learning_rate"] == best
        assert (config["run"]["seed"], curve(output / "runs" / row / "seed2")[-1][0]) == (2, 40)
    check_table(output, output / "tiny-v1", {"two": "plain"})


@pytest.mark.slow
def test_what_is_left_is_whole_and_needs_nothing_else(made: tuple[Path, list[str]]) -> None:
    output, _ = made
    folder = output / "tiny-v1"
    page = (folder / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for part in ("sha256", "Core hours", "3.41", "-0.09", "of 196 documents", "of 4 documents", "On cpu (", "torch 2"):
        assert part in page
    assert (folder / "axis.png").read_bytes()[:4] == b"\x89PNG"
    held_out = (output / "text" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"].split()[0] for line in held_out] == ["49", "99", "149", "199"]
    one_rate = {path.parent.name for path in (output / "one_rate").glob("*/seed1")}
    found = json.loads((folder / "table.json").read_text())["rows"]
    assert one_rate == {row for row in found if found[row]["learning_rate"] != found["plain"]["learning_rate"]}


@pytest.mark.slow
def test_the_archive_makes_the_same_table(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, flags = made
    packed = tmp_path / "metrics.tar.xz"
    _call(*flags, "--gather", f"--archive={packed}")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    for file in filter(Path.is_file, (tmp_path / "unpacked").rglob("*")):
        assert str(output.parent) not in file.read_text(), file
    _call("--table=tiny", f"--output={tmp_path / 'unpacked'}", "--gather")
    files = [folder / "tiny-v1" / "table.json" for folder in (output, tmp_path / "unpacked")]
    first, second = (json.loads(file.read_text()) for file in files)
    for table in (first, second):
        for row in table["rows"].values():
            del row["tokens_per_second"]  # of which six digits are kept, as of loads
            row["fullest_expert"] = row["fullest_expert"] and round(row["fullest_expert"], 4)
    assert first == second


@pytest.mark.slow
def test_a_table_that_the_paper_has_not_names_no_figures(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, flags = made
    spec = yaml.safe_load((output.parent / "tiny.yaml").read_text())
    spec["versions"] = {"ours": {"source": "a second test", "reference": "plain"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "FOLDER", tmp_path)
        _call("--table=own", *flags[1:], "--gather")
    text = (output / "own-ours" / "table.md").read_text()
    assert "Not in the paper: a second test." in text
    assert "| paper: " not in text and "not published" not in text
    found, other = (json.loads((output / name / "table.json").read_text()) for name in ("own-ours", "tiny-v1"))
    assert found["rows"]["two"]["difference"] == other["rows"]["two"]["difference"]


@pytest.mark.slow
def test_a_run_of_several_processes_at_the_papers_scale(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, _ = made
    base = yaml.safe_load((output.parent / "base.yaml").read_text())
    base["train"] |= {"steps": 6, "micro_batch": 1}
    text = {name: str(output / "text" / f"{name}.jsonl") for name in ("train", "validation")}
    base["data"] |= text | {"tokenizer": "bytes"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    spec = yaml.safe_load((output.parent / "tiny.yaml").read_text())
    runs = spec.pop("mini")["runs"]
    spec["versions"]["v1"]["paper"] = {"config": str(tmp_path / "base.yaml"), "seeds": 1, "runs": runs}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "FOLDER", tmp_path)
        _call("--table=two", "--scale=paper", f"--output={tmp_path / 'out'}", "--gpus_per_run=2", "--at_once=1")
    found = json.loads((tmp_path / "out" / "two-v1" / "table.json").read_text())
    assert found["missing"] == []
    for row in ("plain", "two"):
        folder = tmp_path / "out" / "runs" / row / "seed1"
        start = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
        assert (start["event"], start["processes"], curve(folder)[-1][0]) == ("start", 2, 6)


@pytest.mark.slow
def test_dry_says_what_it_takes_here(made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    output, flags = made
    before = sorted(output.rglob("*"))
    _call(*flags, "--dry", "--only=two")
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.startswith("| Two experts (two) |")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:3] == ["5,248", "4,224", "2,560"]  # 8 x (2 x 8 x 24 + 2 or 1 x 2 x 8 x 8 + 16)
    assert float(cells[4].replace(",", "")) > 0
    assert cells[5:7] == ["0", "0"]  # all is done
    assert "hours" in said
    assert sorted(output.rglob("*")) == before


@pytest.mark.slow
def test_a_second_call_makes_nothing_and_another_budget_is_refused(
    made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output, flags = made
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*/*/metrics.jsonl")}
    _call(*flags)
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*/*/*/metrics.jsonl")}
    with pytest.raises(UserError, match=r"made with train\.steps=20, and is now to be 40"):
        _call(*flags, "--tokens=5120")
    with pytest.raises(UserError, match="holds other text"):
        _call(*flags[:2], "--data.train=builtin")
    with pytest.raises(UserError, match="no run is left"):
        _call(*flags, f"--jobs={tmp_path / 'jobs.txt'}")
    shutil.rmtree(output / "runs" / "two" / "seed2")
    (tmp_path / "mine.txt").write_text("precious\n")
    with pytest.raises(UserError, match=r"mine\.txt is there, and is no list of jobs"):
        _call(*flags, f"--jobs={tmp_path / 'mine.txt'}")
    with pytest.raises(UserError, match="is a folder: give a file for the list of jobs"):
        _call(*flags, f"--jobs={tmp_path}")
    assert (tmp_path / "mine.txt").read_text() == "precious\n"
    for _ in range(2):  # a list of an earlier call gives way
        _call(*flags, f"--slurm={tmp_path / 'array'}")
    (line,) = (tmp_path / "array" / "jobs.txt").read_text().splitlines()
    assert line.endswith(f"launch/train.py --config={output}/configs/runs/two/seed2.yaml")
    assert "--array=0-0\n" in (tmp_path / "array" / "array.sbatch").read_text()
    assert _submitted(tmp_path / "array") == ["bash", "-c", f"exec {line}"]
    _call(*flags, "--gather")
    assert "Missing: two seed 2: new." in (output / "tiny-v1" / "table.md").read_text()
    (output / "runs" / "two" / "seed2").mkdir()
    (output / "runs" / "two" / "seed2" / "checkpoints").write_text("a file in the way")
    capsys.readouterr()
    with pytest.raises(RunStopped, match="1 run failed"):
        _call(*flags)
    assert "failed    runs/two/seed2: " in capsys.readouterr().out
