"""The command on a cluster: its tables, JSON and picture, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_mamba.planning.step_time import PARTS
from tests import ROOT
from tools.plan import main

CONFIG = ("--config", str(ROOT / "configs/paper/moe_mamba_25m.yaml"), "--moe.experts=32")
ON_8 = (*CONFIG, "--gpus=8", "--cluster=h100", "--moe.capacity_factor=null")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints."""
    from moe_mamba.command_line import run_command

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
        run_command(main)
        return capsys.readouterr().out

    return call


def test_numbers_add_up(said: Callable[..., str]) -> None:
    found = json.loads(said(*ON_8, "--json", "--tokens=1e12", "--price=2.5", "--parallel.expert=8"))
    assert found["step_seconds"] == pytest.approx(sum(found["parts_seconds"].values()))
    assert tuple(found["parts_seconds"]) == PARTS
    tokens = 64 * 1024 / found["step_seconds"] / 8
    assert found["tokens_per_second_per_gpu"] == pytest.approx(tokens)
    assert found["mfu"] == pytest.approx(found["training_flops_per_token"] * tokens / 989e12)
    assert found["days"] == pytest.approx(1e12 / (8 * tokens) / 86400)
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 8)
    assert found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    parts = {"counts", "experts", "gradients", "statistics", "weights", "norm"}
    assert {flow["part"] for flow in found["collectives"]} == parts
    parameters = sum(found[f"{kind}_parameters"] for kind in ("total", "norm", "embedding"))
    kinds = dict(found["memory_bytes"])
    most = max(kinds["activations"] + kinds["communication"], kinds["update"])
    rest = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer", "fragmentation"))
    assert kinds["total"] == rest + most
    assert found["checkpoint_bytes"] == 12 * parameters
    assert found["checkpoint_seconds"] == pytest.approx(12 * parameters / 2e9)


def test_table_and_files(said: Callable[..., str], tmp_path: Path) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    (tmp_path / "link.json").symlink_to(file)
    link = f"--json={tmp_path}/link.json"
    table = said(*ON_8, link, f"--picture={picture}", "--load=skewed:2", "--cluster.memory_gib=0.1")
    assert "load of the experts: skewed:2, which changes nothing" in table
    assert "DOES NOT FIT" in table
    assert "deepspeed" not in table  # no command for what does not fit
    assert json.loads(file.read_text(encoding="utf-8"))["fits"] is False
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_search_and_worlds(said: Callable[..., str]) -> None:
    table = said(*CONFIG, "--gpus=2", "--cluster=h100", "--search", "--train.global_batch=16")
    assert "combinations counted" in table
    assert "deepspeed --num_gpus=2 launch/train.py --config" in table
    # What the configuration says besides is said again, and what it says otherwise is taken back.
    given = ("--parallel.expert=2", "--train.global_batch=16", "--data.text_key=a b")
    best = said(*CONFIG, "--gpus=2", "--cluster=h100", "--search", "--tokens=5e9", *given).splitlines()[-1]
    assert "--train.steps=null --train.tokens=5000000000" in best
    assert "--parallel.expert=" in best
    assert best.endswith("--moe.experts=32 --train.global_batch=16 '--data.text_key=a b'")
    lines = said(*CONFIG, "--cluster=h100", "--worlds=1,2,3", "--train.global_batch=16").splitlines()
    assert [line.split()[0] for line in lines] == ["GPUs", "1", "2", "3"]
    assert "cannot be: no layout of 3 GPUs" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((*CONFIG, "--search"), "--search is for a run on a cluster: give --cluster=h100"),
        ((*CONFIG, "--tokens=1e9"), "--tokens is for a run on a cluster"),
        ((*CONFIG, "--cluster=h100"), "needs to know how many GPUs: give --gpus=8"),
        ((*CONFIG, "--cluster=h99", "--gpus=8"), "cluster='h99' is not known"),
        ((*CONFIG, "--cluster.memory_gib=80"), "--cluster.memory_gib changes a cluster"),
        ((*ON_8, "--cluster.size=80"), "--cluster.size is no figure of a cluster"),
        ((*ON_8, "--gpus=12"), "--gpus is given twice"),
        ((*CONFIG, "--cluster=h100", "--gpus=12"), "--gpus=12 is no whole number of machines of 8: give 8"),
        ((*ON_8, "--load=odd"), "load=odd is not known"),
        ((*ON_8, "--load=skewed:33"), "32 experts have at most 32 times the mean"),
        ((*ON_8, "--load=skewed:2", "--model.pattern=M"), "the model has no experts: leave out --load"),
        ((*CONFIG, "--gpus=8", "--cluster=h100", "--load=skewed:2"), "their capacity at any load: leave out --load"),
        ((*ON_8, "--json=/proc/x.json"), "--json=/proc/x.json cannot be written"),
        ((*ON_8, "--picture=/dev.png/x.png"), "there is no folder"),
        ((*CONFIG, "--gpus="), "--gpus=: give a value"),
        ((*CONFIG, "--cluster=h100", "--worlds"), "--worlds=True: give numbers with commas between them"),
        ((*ON_8, "--picture=x.doc"), "--picture=x.doc: give a file that ends in .png, .svg, .pdf"),
        ((*ON_8, "--json=none/x.json"), "there is no folder"),
        ((*ON_8, "--shards"), "--shards prints a table that is the same for any layout"),
        ((*ON_8, "--worlds=8"), "--worlds prints a table of searches"),
        ((*CONFIG, "--cluster=h100", "--worlds=8,x"), "--worlds="),
        ((*CONFIG, "--measured=none.json", "--gpus=8"), "none.json is missing"),
        ((*ON_8, "--parallel.tensor=3"), "parallel.tensor=3 does not divide"),
    ],
)
def test_refusals(refusal: Callable[..., str], flags: tuple[str, ...], line: str) -> None:
    assert line in refusal(main, *flags)


def test_a_folder_is_no_file_to_write(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    (tmp_path / "plan.png").symlink_to("/dev/full")
    assert "is there and is no file" in refusal(main, *ON_8, f"--json={tmp_path}/plan.json")
    assert "is there and is no file" in refusal(main, *ON_8, f"--picture={tmp_path}/plan.png")
