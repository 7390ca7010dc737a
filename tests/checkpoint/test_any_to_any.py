"""Whatever was saved on one layout goes on in any other, along the curve of one process that never stopped."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.layouts import Layout, difference
from tests.train.runs import curve, run, weights
from tests.world import World

SAVED, STEPS = 4, 8
LAYOUTS = (
    Layout(1, zero=0),
    Layout(2, tensor=2, expert=2, zero=1),
    Layout(4, tensor=2, expert=4, zero=2),
    Layout(4, tensor=1, expert=2, zero=1),
    Layout(4, tensor=4, expert=1, zero=0),
    Layout(3, tensor=1, expert=1, zero=2),
)
KEYS = {
    "model__pattern": "(ME)M-*E",
    "moe__inner__projections": "conv,gate,out",
    "moe__inner__router": "shared",
    "moe__inner__every": 2,
    "model__heads": 4,
    "model__kv_heads": 2,
    "model__vocab_size": 301,
    "model__mamba_norms": True,
    "moe__capacity_factor": None,
    "moe__balance": "bias",
    "train__steps": STEPS,
    "train__global_batch": 12,
    "train__learning_rate": 1e-3,
    "train__validate_every": 0,
    "train__sample_tokens": 0,
    "checkpoint__every": SAVED,
}


def train_in(world: World, tiny: Path, folder: Path, layout: Layout, **keys: Any) -> list[dict]:
    """Train in a layout, one micro-step per step."""
    axes = {"parallel__tensor": layout.tensor, "parallel__expert": layout.expert, "parallel__zero": layout.zero}
    together = {"train__micro_batch": KEYS["train__global_batch"] // layout.data}
    return run(world, tiny, folder, ranks=layout.ranks, **KEYS | axes | together | keys)


@pytest.fixture(scope="module")
def single(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict]:
    """Losses of all steps and last weights of one process that never stopped."""
    folder = tmp_path_factory.mktemp("single")
    return curve(train_in(world, tiny, folder, LAYOUTS[0])), weights(folder)


@pytest.fixture(scope="module")
def saved(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """Layout -> folder of a run in it that stopped half-way; filled as tests ask."""
    return {}


def stopped_run(
    world: World, tiny: Path, saved: dict[Layout, Path], layout: Layout, factory: pytest.TempPathFactory
) -> Path:
    if layout not in saved:
        saved[layout] = factory.mktemp("saved")
        train_in(world, tiny, saved[layout], layout, checkpoint__keep=2)
        shutil.rmtree(saved[layout] / "checkpoints" / f"step-{STEPS:08d}")
    return saved[layout]


CHAIN = list(itertools.pairwise((*LAYOUTS, LAYOUTS[0])))  # each layout saves once and loads once
QUICK = (CHAIN[4],)  # tensor over four, then an odd number of ranks


def mark_of(pair: tuple[Layout, Layout]) -> list[pytest.MarkDecorator]:
    if pair in QUICK:
        return []
    return [pytest.mark.slow if pair in CHAIN else pytest.mark.long]


PAIRS = [
    pytest.param(first, second, marks=mark_of((first, second))) for first, second in itertools.permutations(LAYOUTS, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_a_run_goes_on_in_another_layout(
    world: World,
    tiny: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    single: tuple[list[float], dict[str, torch.Tensor]],
    saved: dict[Layout, Path],
    first: Layout,
    second: Layout,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped_run(world, tiny, saved, first, tmp_path_factory), folder)
    losses = curve(train_in(world, tiny, folder, second))
    assert len(losses) == STEPS
    assert max(abs(mine / its - 1) for mine, its in zip(losses, single[0], strict=True)) <= 1e-5
    found = weights(folder)
    assert found.keys() == single[1].keys()
    for name, expected in single[1].items():
        if name.startswith("weights/"):
            assert difference(found[name], expected) <= 1e-4, name
