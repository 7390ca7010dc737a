"""What gathering says of runs that are damaged, have diverged, are missing, or were made otherwise."""

import json
import re
import shutil
import tarfile
from itertools import product
from pathlib import Path

import pytest

from moe_mamba.commands.reproduce import main
from moe_mamba.errors import UserError
from tests import ROOT

ARCHIVE = ROOT / "docs" / "measurements" / "science" / "runs.tar.xz"
ONLY = "mamba,moe_mamba"
ROWS = ("transformer", "mamba", "moe_mamba")
KINDS = ("sweep", "runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of some of the committed runs, to be spoilt."""
    shutil.copytree(whole / "text", tmp_path / "output" / "text")
    for kind, row in product(KINDS, ROWS):
        shutil.copytree(whole / kind / row, tmp_path / "output" / kind / row)
    return tmp_path / "output"


def _row(output: Path, title: str) -> list[str]:
    lines = (output / "main-v1" / "table.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {title} |")).split(" | ")


def _spoil(output: Path, name: str, kept: int) -> None:
    path = output / name / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))


@pytest.mark.parametrize("run", ["runs/moe_mamba/seed2", "sweep/mamba/rate0.008"])
@pytest.mark.parametrize("kept", [0, -1])
def test_a_damaged_end_is_no_other_loss(output: Path, run: str, kept: int) -> None:
    _spoil(output, run, kept)
    with pytest.raises(UserError, match=rf"{run}/metrics.jsonl has no validation loss of step \d+"):
        main(table="main", gather=True, only=ONLY, output=str(output))


def test_runs_that_were_made_otherwise_are_refused(output: Path) -> None:
    with pytest.raises(UserError, match=r"rate[\d.]+ was made with train\.steps=732, and is now to be 37"):
        main(table="main", gather=True, only=ONLY, tokens=1_000_000, output=str(output))
    assert not (output / "main-v1").exists()
    path = output / "runs" / "mamba" / "seed3" / "config.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.1\n", "weight_decay: 0.5\n"))
    with pytest.raises(UserError, match=r"runs/mamba/seed3 was made with train\.weight_decay=0.5, and is now to be"):
        main(table="main", gather=True, only=ONLY, output=str(output))


def test_an_empty_table_is_not_written(output: Path) -> None:
    shutil.rmtree(output / "runs")
    with pytest.raises(UserError, match="no finished run of this table"):
        main(table="main", gather=True, only=ONLY, output=str(output))
    assert not (output / "main-v1").exists()


def _changed(output: Path, key: str, value: object) -> None:
    """Give the last line of a run's metrics that has a key another value of it."""
    path = output / "runs" / "moe_mamba" / "seed2" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in reversed(lines) if key in line)[key] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("validation_loss", float("nan"), "has nan for the validation loss of step 4882"),
        ("validation_loss", "4.0", "has '4.0' for the validation loss of step 4882"),
        ("expert_load", {"1": []}, "has loads of experts that are none"),
        ("expert_load", {"1": "even"}, "has loads of experts that are none"),
        ("expert_load", [1], "has loads of experts that are none"),
    ],
)
def test_what_is_no_number_is_damaged(output: Path, key: str, value: object, said: str) -> None:
    _changed(output, key, value)
    with pytest.raises(UserError, match=rf"runs/moe_mamba/seed2/metrics.jsonl {said}: it is damaged"):
        main(table="main", gather=True, only=ONLY, output=str(output))


@pytest.mark.parametrize(
    ("file", "said"),
    [("metrics.jsonl", "does not exist, though the run has finished"), ("config.yaml", "nobody knows what made them")],
)
def test_a_run_without_one_of_its_files_is_no_run(output: Path, file: str, said: str) -> None:
    (output / "runs" / "moe_mamba" / "seed2" / file).unlink()
    with pytest.raises(UserError, match=said):
        main(table="main", gather=True, only=ONLY, output=str(output))


def test_every_seed_that_is_begun_and_not_finished_is_missing(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (2, 5):  # one that is asked for, and one beyond
        path = output / "runs" / "moe_mamba" / f"seed{seed}" / "events.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    main(table="main", gather=True, only=ONLY, seeds=3, output=str(output))
    lines = [f"moe_mamba seed {seed}: begun" for seed in (2, 5)]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")] == [
        f"missing   {line}" for line in lines
    ]
    text = (output / "main-v1" / "table.md").read_text()
    assert all(f"Missing: {line}." in text for line in lines)


def test_a_file_that_is_no_archive_is_not_written_over(output: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.tar.xz").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.tar\.xz is there, and is no archive"):
        main(table="main", only=ONLY, gather=True, archive=str(tmp_path / "mine.tar.xz"), output=str(output))


def test_what_an_archive_left_makes_no_runs(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output is of an archive, which has no text to train on: give --gather"):
        main(table="main", only=ONLY, seeds=6, jobs=str(tmp_path / "jobs.txt"), output=str(output))
    with pytest.raises(UserError, match="output is of an archive, which has one text: leave --data out"):
        main(table="main", only=ONLY, gather=True, output=str(output), **{"data.train": "wiki.jsonl.gz"})


@pytest.mark.parametrize("seeds", [1, 5])
def test_of_a_row_that_diverged_no_difference_is_told(output: Path, seeds: int) -> None:
    path = output / "runs" / "moe_mamba" / "seed2" / "events.jsonl"
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1]) | {"event": "nan", "action": "stop", "step": 4000}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    main(table="main", gather=True, only=ONLY, seeds=seeds, output=str(output))
    text = (output / "main-v1" / "table.md").read_text()
    assert _row(output, "MoE-Mamba")[5:8] == ["diverged", "-", "-"]
    assert "Missing: moe_mamba seed 2: diverged." in text
    (order,) = [line for line in text.splitlines() if line.startswith("- Order here")]
    assert "MoE-Mamba" not in order
    over_tokens = text.split("## The difference over tokens")[1].split("##")[0]
    assert "| Transformer |" in over_tokens and "MoE-Mamba" not in over_tokens


def test_a_difference_over_fewer_seeds_says_so(output: Path) -> None:
    shutil.rmtree(output / "runs" / "mamba" / "seed5")
    main(table="main", gather=True, only=ONLY, output=str(output))
    row = _row(output, "MoE-Mamba")
    assert row[4] == "5"
    assert re.fullmatch(r"-\d\.\d{4} \(-\d\.\d{4} to -\d\.\d{4}; 4 seeds\)", row[6])


def test_an_archive_has_all_and_names_nothing_of_the_machine(whole: Path) -> None:
    kinds = {path.name for path in whole.rglob("*") if path.is_file()}
    assert kinds == {"text.json", "config.yaml", "events.jsonl", "metrics.jsonl"}
    for path in whole.rglob("*.yaml"):
        assert not re.search(r": /|- /|: ~", path.read_text()), path
