"""A step's expected time: its parts add up, follow the figures of a cluster, and hold what the model counts."""

from dataclasses import replace

import pytest

from moe_mamba.config import Config
from moe_mamba.model.work import Attended, Product, Scan
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.estimate import run_plan, with_keys
from moe_mamba.planning.load import Load
from moe_mamba.planning.step_time import StepTime, _works, step_time
from tests.parallel.layouts import Layout, config_of

EVEN = Load()
H100 = Cluster.of("h100")


def timed(config: Config, gpus: int, cluster: Cluster = H100, load: Load = EVEN, accumulation: int = 1) -> StepTime:
    plan = run_plan(config, cluster, gpus, load)
    return step_time(plan, cluster, config.train.micro_batch or 1, accumulation, load)


def large(pattern: str, layout: Layout, **keys: object) -> Config:
    """Large enough that a GPU is busy."""
    sizes = {"model__d_model": 2048, "model__d_ff": 8192, "model__vocab_size": 32000, "data__sequence_length": 2048}
    return config_of(pattern, layout, train__precision="bf16", moe__d_expert=4096, **(sizes | keys))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["M*-", "ME", "(ME)-", "M own", "M shared top-2", "M switch"])
def test_declared_operations_are_those_that_the_model_counts(pattern: str) -> None:
    """Of one rank that has everything, forward once and backward twice; the convolution's are in a pass over memory."""
    config = config_of(pattern, Layout(1), data__sequence_length=64)
    plan = run_plan(config, H100, 1, EVEN)
    works = _works(plan, 2, EVEN)
    declared = sum(
        3 * times * work.flops
        for layer, times, _ in works
        for work in layer
        if isinstance(work, Product | Attended | Scan)
    )
    convolved = sum(6 * weight.numel() for name, weight in plan.model.named_parameters() if "conv1d.weight" in name)
    assert declared == 2 * 64 * (plan.model.flops_per_token(64) - convolved)


def test_ranks_share_the_operations() -> None:
    """But for those of routers, and of key heads that several ranks hold."""
    whole, shared = (
        [
            sum(
                times * work.flops
                for layer, times, _ in _works(plan, 2, EVEN)
                for work in layer
                if isinstance(work, kind)
            )
            for kind in (Product, Scan)
        ]
        for plan in (
            run_plan(config_of("M-", layout), H100, layout.ranks, EVEN) for layout in (Layout(1), Layout(2, 2))
        )
    )
    head = 2 * 16 * 16 * (2 * 256 - 301)  # words that only pad the vocabulary
    assert shared[1] * 2 == whole[1]
    assert shared[0] * 2 == pytest.approx(whole[0] + head * 8 / 8, rel=0.02)


def test_a_slower_part_takes_longer_and_says_so() -> None:
    config, layout = large("ME", Layout(16, 2, 8), moe__experts=8), 16
    usual = timed(config, layout)
    for figure, part, bound in (
        ("bf16", "products", "matrix products"),
        ("plain", "scan", "the scan"),
        ("memory_rate", "memory", "the engine and the optimizer"),
    ):
        slow = timed(config, layout, replace(H100, **{figure: getattr(H100, figure) / 50}))
        assert slow.parts[part] > 10 * usual.parts[part]
        assert slow.bound == bound
    far = timed(config, layout, H100.changed(between_rate=H100.between.rate / 100))
    assert far.bound == "links between machines"
    assert far.seconds > usual.seconds


def test_recomputation_makes_the_forward_pass_again() -> None:
    config = large("M-", Layout(8))
    plain, again = timed(config, 8), timed(large("M-", Layout(8), train__recompute=True), 8)
    assert again.parts["scan"] == pytest.approx(4 / 3 * plain.parts["scan"])


def test_reductions_run_beside_the_backward_pass_unless_a_gradient_fits_no_bucket() -> None:
    beside = timed(large("M-", Layout(8)), 8)
    alone = timed(large("M-", Layout(8), model__vocab_size=40000), 8)  # an embedding of more than 2^26 numbers
    assert beside.hidden > 0
    assert alone.hidden == 0
    assert alone.parts["inside"] > 5 * beside.parts["inside"]


def test_rows_travel_beside_the_other_mixers_of_their_layer() -> None:
    layout, keys = Layout(8, 1, 8), {"moe__experts": 8, "model__vocab_size": 40000}
    apart, together = timed(large("ME", layout, **keys), 8), timed(large("(ME)", layout, **keys), 8)
    assert apart.hidden == 0
    assert together.hidden > 0
    assert together.parts["inside"] < apart.parts["inside"]


def test_the_fullest_rank_sets_the_pace() -> None:
    config = large("ME", Layout(8, 1, 8), moe__experts=8)
    even, skewed = (timed(config, 8, load=Load.parse(text)) for text in ("even", "skewed:2"))
    assert skewed.parts["experts"] == pytest.approx(2 * even.parts["experts"], rel=0.01)


def test_an_optimizer_on_the_host_takes_longer() -> None:
    config = large("M-", Layout(8))
    plan = run_plan(config, H100, 8, EVEN)
    offloaded = with_keys(plan, parallel={"offload_optimizer": True})
    on_device, on_host = (step_time(one, H100, 2, 1, EVEN).parts["optimizer"] for one in (plan, offloaded))
    assert on_host > 2 * on_device


def test_small_steps_wait_for_the_host() -> None:
    assert timed(config_of("ME", Layout(1), train__precision="bf16"), 1).bound == "the host"
