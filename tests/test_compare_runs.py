"""The tool that compares two checkouts sees that one equals itself, and sees every kind of difference."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_runs
import convert_to_hf
import pytest
import torch

from launch.train import train
from moe_mamba.errors import UserError
from tests import ROOT
from tests.world import World


class Here:
    """This checkout, without the seconds that a process of its own takes to start."""

    def __init__(self, world: World, **keys: Any) -> None:
        self.world = world
        self.keys = {key.replace("__", "."): value for key, value in keys.items()}

    def train(self, config: Path, folder: Path, processes: int) -> None:
        self.world.run(train, ranks=processes, config=str(config), **{"run.folder": str(folder)}, **self.keys)

    def export(self, folder: Path, output: Path) -> None:
        convert_to_hf.main(str(folder), str(output))


@pytest.fixture
def small(corpus: Path) -> dict[str, Any]:
    """Keys of a run that takes a second."""
    return {
        "data.train": [str(corpus / "train.jsonl")],
        "data.validation": [str(corpus / "validation.jsonl")],
        "data.cache": str(corpus / "cache"),
        "data.sequence_length": 16,
    }


@pytest.mark.parametrize(
    ("keys", "is_equal"), [pytest.param({}, True, marks=pytest.mark.slow), ({"train__learning_rate": 2e-3}, False)]
)
def test_what_differs_is_seen(
    world: World, small: dict[str, Any], tmp_path: Path, keys: dict[str, Any], is_equal: bool
) -> None:
    sides = Here(world), Here(world, **keys)
    layout = compare_runs.LAYOUTS["single"]
    found = list(compare_runs.compare(*sides, tmp_path, "ME", layout, 2, small))
    assert [comparison.what for comparison in found] == ["losses", "checkpoint", "resume", "export"]
    for comparison in found:
        assert comparison.count > 10
        assert (comparison.difference is None) == is_equal, comparison
        assert is_equal == str(comparison).endswith("compared: equal")


NAN, ZERO = torch.tensor([float("nan"), 1.0]), torch.zeros(2)


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ({"a": NAN, "b": 0.1, "c": None}, {"c": None, "b": 0.1, "a": NAN.clone()}, None),
        ({"a": torch.tensor(2.0)}, {"a": torch.tensor(2.0)}, None),
        ({"a": torch.empty(0, 3)}, {"a": torch.empty(0, 3)}, None),
        ({"a": 0.1, "b": 1}, {"a": 0.1}, "b is missing after"),
        ({"a": 0.1}, {"a": 0.1, "b": ZERO}, "b is new after"),
        ({"a": 0.1}, {"a": 0.1 + 2e-17}, "a is 0.1 before and 0.10000000000000002 after"),
        ({"a": ZERO}, {"a": -ZERO}, "a differs in 2 of 2 values, by at most 0.00e+00"),
        ({"a": ZERO}, {"a": torch.tensor([0.0, 0.5])}, "a differs in 1 of 2 values, by at most 5.00e-01"),
        (
            {"a": ZERO},
            {"a": ZERO.bfloat16()},
            "a is torch.float32 of (2,) before and torch.bfloat16 of (2,) after",
        ),
    ],
)
def test_first_difference(before: dict[str, Any], after: dict[str, Any], difference: str | None) -> None:
    assert compare_runs.compare_values(before, after)[0] == difference


def test_a_difference_within_a_bound_is_told_and_allowed() -> None:
    before = {"loss": 2.0, "a": torch.tensor([4.0, 0.5]), "count": 3}
    after = {"loss": 2.0 + 2e-6, "a": torch.tensor([4.0, 0.5 + 2.0**-18]), "count": 3}
    assert compare_runs.compare_values(before, after, 1e-5) == (None, pytest.approx(1e-6, rel=1e-3))
    difference, largest = compare_runs.compare_values(before, after, 9e-7)
    assert difference is not None and difference.startswith("loss is 2.0 before")
    assert largest == pytest.approx(1e-6, rel=1e-3)
    for name, value in (("count", 4), ("loss", float("nan")), ("a", torch.zeros(3))):
        difference, _ = compare_runs.compare_values(before, before | {name: value}, 1e-5)
        assert difference is not None and difference.startswith(name)
    assert compare_runs.compare_values({"a": torch.zeros(2)}, {"a": -torch.zeros(2)}, 1e-5)[0] is None


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no launch/train.py: give the root of a checkout$"):
        compare_runs.main(str(tmp_path), str(ROOT))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").touch()
    (tmp_path / "moe_mamba.py").touch()
    with pytest.raises(UserError, match=r"Python imports .*moe_mamba.py instead: give the root of a checkout$"):
        compare_runs.main(str(tmp_path), str(ROOT))


def test_refusals_come_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--layouts=two: no layout is called 'two': choose among single, tp2_ep2$"):
        compare_runs.main(str(ROOT), str(ROOT), layouts="two")
    with pytest.raises(UserError, match=r"already exists: give a new one"):
        compare_runs.main(str(ROOT), str(ROOT), folder=str(tmp_path))


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    flags = [f"--before={ROOT}", f"--after={ROOT}", "--steps=2", "--patterns=*E", f"--output={tmp_path / 'found.json'}"]
    done = subprocess.run([sys.executable, "tools/compare_runs.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compared: equal") == 8
    assert done.stdout.endswith("equal in all 8 comparisons, 2 steps per run\n")
    assert '"difference": null' in (tmp_path / "found.json").read_text()
