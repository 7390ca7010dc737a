"""ZeRO-3 trains the same function as one process under ZeRO 1."""

import contextlib
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers import mamba
from moe_mamba.parallel import buckets, zero3
from moe_mamba.parallel import engine as engines
from tests.parallel.layouts import Layout, Trained, assemble, batch_of, build, config_of, train
from tests.parallel.test_parity import IMPORTED, STEPS, Errors, worst
from tests.train.runs import curve, run, weights
from tests.world import World


@contextlib.contextmanager
def nothing_stays_gathered() -> Iterator[None]:
    """In a worker: every weight is freed after use, however small."""
    usual, buckets.PERSISTENT = buckets.PERSISTENT, 0
    try:
        yield
    finally:
        buckets.PERSISTENT = usual


def train_gathering(config: Config, steps: int) -> Trained:
    """In a worker: train so."""
    with nothing_stays_gathered():
        return train(config, steps)


def check_same_curve(world: World, pattern: str, layouts: list[Layout], **keys: Any) -> None:
    """20 steps on each layout give what one process gives under ZeRO 1."""
    keys = {"train__learning_rate": 1e-3} | keys
    (single,) = world.run(train, config_of(pattern, Layout(1), **keys), STEPS, ranks=1)
    for layout in layouts:
        ranks = world.run(train_gathering, config_of(pattern, layout, **keys), STEPS, ranks=layout.ranks)
        for rank in ranks:
            assert rank.norms == pytest.approx(single.norms, rel=1e-4), layout
        Errors(
            norm=0.0,  # asserted above
            loss=max(
                abs(mine / its - 1) for rank in ranks for mine, its in zip(rank.losses, single.losses, strict=True)
            ),
            gradient=worst(assemble([rank.gradients for rank in ranks]), assemble([single.gradients]))[0],
            weight=worst(assemble([rank.weights for rank in ranks]), assemble([single.weights]))[0],
        ).check(layout)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ("M-", (4,)),
        pytest.param("M-", (1, 2), marks=pytest.mark.slow),
        pytest.param("*-", (1, 2, 4), marks=pytest.mark.slow),
    ],
)
def test_same_curve_as_one_process(world: World, pattern: str, ranks: tuple[int, ...]) -> None:
    check_same_curve(world, pattern, [Layout(count, zero=3) for count in ranks])


@pytest.mark.parametrize("ranks", [pytest.param(count, marks=pytest.mark.slow) for count in (2, 4)])
def test_tensor_ranks(world: World, ranks: int) -> None:
    check_same_curve(world, "M-", [Layout(ranks, 2, zero=3)])


@pytest.mark.slow
def test_biases(world: World) -> None:
    check_same_curve(world, "*-", [Layout(2, zero=3), Layout(4, 2, zero=3)], **IMPORTED)


@pytest.mark.slow
def test_recomputation(world: World) -> None:
    check_same_curve(world, "M-", [Layout(2, zero=3)], train__recompute=True)


def check_resumes(world: World, tiny: Path, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    """A run that begins with the keys `first` and goes on with `second` gives what one process gives under ZeRO 1."""
    keys: dict[str, Any] = {"model__pattern": "M-"}
    whole = run(world, tiny, folder / "whole", **keys)
    part = folder / "part"
    run(world, tiny, part, **keys | first)
    for late in ("step-00000006", "step-00000004"):
        shutil.rmtree(part / "checkpoints" / late)
    both = run(world, tiny, part, **keys | second)
    assert "resumed" in (part / "log.txt").read_text()
    assert curve(both) == pytest.approx(curve(whole), rel=1e-5)
    scores = [[line["validation_loss"] for line in lines if "validation_loss" in line] for lines in (both, whole)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    error, name = worst(weights(part), weights(folder / "whole"))
    assert error <= 1e-4, name


@pytest.mark.parametrize(
    "there",
    [
        pytest.param({"parallel__zero": 2, "ranks": 1}, marks=pytest.mark.slow),
        pytest.param({"parallel__zero": 0, "ranks": 4}, marks=pytest.mark.slow),
    ],
)
def test_runs_resume_under_another_stage_and_back(
    world: World, tiny: Path, tmp_path: Path, there: dict[str, Any]
) -> None:
    here = {"parallel__zero": 3, "ranks": 2}
    check_resumes(world, tiny, tmp_path / "from", here, there)
    check_resumes(world, tiny, tmp_path / "to", there, here)


@pytest.mark.slow
def test_runs_resume_on_other_ranks_of_this_stage(world: World, tiny: Path, tmp_path: Path) -> None:
    here, there = {"parallel__zero": 3, "ranks": 4}, {"parallel__zero": 3, "ranks": 2, "parallel__tensor": 2}
    check_resumes(world, tiny, tmp_path, here, there)


def most_parameters_held(config: Config) -> tuple[int, int, int]:
    """In a worker: elements that are kept, that were whole at once while the model was made, and of the whole model."""
    most, fill = 0, zero3.fill
    before = {id(thing) for thing in gc.get_objects() if type(thing) is nn.Parameter}

    def noting(tensors: dict[str, Tensor], *arguments: Any) -> None:
        nonlocal most
        fill(tensors, *arguments)
        parameters = [thing for thing in gc.get_objects() if type(thing) is nn.Parameter and id(thing) not in before]
        most = max(most, sum(parameter.numel() for parameter in parameters if not parameter.is_meta))

    zero3.fill = noting
    try:
        parameters = list(build(config).model.parameters())
    finally:
        zero3.fill = fill
    return sum(p.ds_tensor.numel() for p in parameters), most, sum(p.ds_numel for p in parameters)


@pytest.mark.slow
def test_no_rank_ever_holds_the_model(world: World) -> None:
    config = config_of("M-", Layout(4, zero=3), model__repeat=3)
    for kept, most, whole in world.run(most_parameters_held, config, ranks=4):
        assert kept == pytest.approx(whole / 4, rel=0.02)
        assert most == config.model.vocab_size * config.model.d_model  # one module's


def dtypes(config: Config) -> tuple[dict[str, torch.dtype], set[torch.dtype], dict[str, torch.dtype], torch.dtype]:
    """In a worker: of running parameters, of all state, of what the selective scan is given, and of the stream."""
    built = build(config)
    with nothing_stays_gathered():
        engine = engines.build_engine(built.model, config, built.groups, config.train.micro_batch)
    seen: dict[str, torch.dtype] = {}
    scan, names = mamba.selective_scan, ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")

    def noting(*arguments: Any, **options: Any) -> Any:
        seen.update({name: argument.dtype for name, argument in zip(names, arguments, strict=False)})
        return scan(*arguments, **options)

    streams: list[torch.dtype] = []
    built.model.layers[0].register_forward_hook(lambda _, __, output: streams.append(output[0].dtype))
    mamba.selective_scan = noting
    tokens, _, document_starts = (values[: config.train.micro_batch] for values in batch_of(0, config))
    try:
        engine(tokens, document_starts)
    finally:
        mamba.selective_scan = scan
    running = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    return running, {shard.tensor.dtype for shard in engines.state_shards(engine, built.held)}, seen, streams[0]


@pytest.mark.parametrize(("zero", "tensor"), [(1, 1), (2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dtypes_of_a_running_engine(world: World, zero: int, tensor: int, offload: bool) -> None:
    keys: dict[str, Any] = {"train__precision": "bf16", "parallel__offload_optimizer": offload}
    config = config_of("M*-", Layout(2 * tensor, tensor, zero=zero), **keys)
    fp32 = LanguageModel(config.model, config.moe).fp32_parameter_names()
    for running, state, scan, stream in world.run(dtypes, config, ranks=2 * tensor):
        kept = {name for name, dtype in running.items() if dtype == torch.float32}
        assert kept == (running.keys() if zero == 3 else fp32)
        assert state == {torch.float32}
        assert stream == torch.bfloat16
        in_fp32 = {name for name, dtype in scan.items() if dtype == torch.float32}
        assert in_fp32 == {"A", "D", "delta_bias"} and scan["x"] == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "tensor"),
    [("M-", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("M-", 2), ("*-", 1), ("*-", 2)))],
)
def test_bf16_is_the_same_function_at_every_stage(world: World, pattern: str, tensor: int) -> None:
    keys: dict[str, Any] = {"train__precision": "bf16", "train__learning_rate": 1e-3}
    here, there = (config_of(pattern, Layout(2 * tensor, tensor, zero=zero), **keys) for zero in (1, 3))
    under_1 = world.run(train, here, 5, ranks=2 * tensor)[0].losses
    under_3 = world.run(train_gathering, there, 5, ranks=2 * tensor)[0].losses
    assert under_3[0] == pytest.approx(under_1[0], rel=1e-6)  # gradients are summed in fp32 here, in bf16 there
    assert under_3 == pytest.approx(under_1, rel=1e-4)
