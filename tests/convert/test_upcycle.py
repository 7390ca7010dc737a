"""A dense checkpoint becomes a mixture of experts whose first pass gives the same, and which trains on."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.convert.starting_point import write_starting_point
from moe_mamba.convert.upcycle import output_scale, routing, upcycle, upcycled_config
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.restore import Restored, restore, weight_shards
from tests.train.runs import curve, run, weights
from tests.world import WorkerError, World
from tools.upcycle import main

CPU = torch.device("cpu")
ROUTINGS = {
    "switch": {},
    "seven experts": {"experts": 7},
    "sigmoid": {"scores": "sigmoid"},
    "top 2": {"top_k": 2, "renormalize": False},
    "top 2, renormalised": {"top_k": 2},
    "top 2, sigmoid, renormalised": {"top_k": 2, "scores": "sigmoid"},
    "top 1 of top_k, bias": {"router": "top_k", "balance": "bias"},
}


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``dense(pattern, activation)``: the folder of two pairs of layers with logits as large as trained ones."""

    @functools.cache
    def make(pattern: str = "M-", activation: str = "relu") -> Path:
        sizes = {"repeat": 2, "d_model": 16, "d_state": 4, "vocab_size": 257, "heads": 4}
        config = Config(model={"pattern": pattern, "activation": activation, **sizes})
        model = LanguageModel(config.model, config.moe)
        initialize(model, 0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("out_proj.weight", "head.weight")):
                    weight *= 8
        output = tmp_path_factory.mktemp("dense") / "run"
        write_starting_point(output, config, BytesTokenizer(), weight_shards(model))
        return output

    return make


@pytest.fixture(scope="module")
def trained(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-MLP that was trained for some steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(world, tiny, folder, model__pattern="M-", train__validate_every=0)
    return folder


def tokens() -> Tensor:
    return torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(restored: Restored) -> Tensor:
    return restored.model(tokens()).logits


def upcycled(dense: Path, output: Path, noise: float = 0.0, every: int = 1, **keys: Any) -> Restored:
    upcycle(dense, output, routing(**{"experts": 4} | keys), every, noise)
    return restore(output, CPU)


@pytest.mark.parametrize(("pattern", "activation"), [("M-", "relu"), ("*-", "swiglu")])
@pytest.mark.parametrize("keys", ROUTINGS.values(), ids=ROUTINGS)
def test_the_first_pass_is_the_dense_models(
    dense: Callable[..., Path], tmp_path: Path, pattern: str, activation: str, keys: dict[str, Any]
) -> None:
    source = dense(pattern, activation)
    sparse = upcycled(source, tmp_path / "run", **keys)
    assert sparse.config.model.pattern == pattern.replace("-", "E")
    expected = logits(restore(source, CPU))
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        statistics = sparse.model(tokens()).statistics
    for layer in statistics.values():  # tokens spread: no tie sends them all to one expert
        assert (layer.assigned > 0).sum() > sparse.config.moe.top_k


@pytest.mark.parametrize("activation", ["squared_relu", "gelu"])
def test_any_activation_is_equal(dense: Callable[..., Path], tmp_path: Path, activation: str) -> None:
    source = dense("M-", activation)
    sparse = upcycled(source, tmp_path / "run")
    torch.testing.assert_close(logits(sparse), logits(restore(source, CPU)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"inner": {"projections": ["out"]}}], ids=["layers", "inside Mamba"])
def test_a_larger_router_would_not_be_equal(
    dense: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr("moe_mamba.convert.upcycle.ROUTER_SCALE", 1.0)
    sparse = upcycled(dense(), tmp_path / "run", **keys)
    assert (logits(sparse) - logits(restore(dense(), CPU))).abs().max() > 0.01


def test_feed_forward_layers_beside_others_become_experts(dense: Callable[..., Path], tmp_path: Path) -> None:
    for pattern, every, becomes in (("(M-)", 1, ("(ME)", 2)), ("(*-)-", 1, ("(*E)E", 2)), ("(M-)", 2, ("(M-)(ME)", 1))):
        sparse = upcycled(dense(pattern), tmp_path / f"{pattern}{every}", every=every, top_k=2)
        assert (sparse.config.model.pattern, sparse.config.model.repeat) == becomes
        torch.testing.assert_close(logits(sparse), logits(restore(dense(pattern), CPU)), rtol=0, atol=1e-5)


PROJECTIONS = ["conv", "gate", "out"]
INSIDE: dict[str, dict[str, Any]] = {
    "own": {"inner": {"projections": PROJECTIONS}},
    "own, sigmoid": {"scores": "sigmoid", "inner": {"projections": ["gate", "out"]}},
    "own, top 2": {"top_k": 2, "renormalize": False, "inner": {"projections": ["out", "conv"]}},
    "own, top 2, renormalised": {"top_k": 2, "inner": {"projections": PROJECTIONS}},
    "shared": {"inner": {"projections": PROJECTIONS, "router": "shared"}},
    "shared, bias": {"balance": "bias", "inner": {"projections": ["out"], "router": "shared"}},
    "shared, top 2": {"top_k": 2, "renormalize": False, "inner": {"projections": PROJECTIONS, "router": "shared"}},
    "shared, top 2, renormalised": {"top_k": 2, "inner": {"projections": ["conv", "out"], "router": "shared"}},
    "shared, sigmoid": {
        "top_k": 3,
        "renormalize": False,
        "scores": "sigmoid",
        "inner": {"projections": PROJECTIONS, "router": "shared"},
    },
}


@pytest.mark.parametrize(("pattern", "every"), [("M-", 1), ("(M*)", 2)])
@pytest.mark.parametrize("keys", INSIDE.values(), ids=INSIDE)
def test_projections_inside_mamba_become_experts(
    dense: Callable[..., Path], tmp_path: Path, pattern: str, every: int, keys: dict[str, Any]
) -> None:
    source = dense(pattern)
    sparse = upcycled(source, tmp_path / "run", every=every, **keys)
    inner = sparse.config.moe.inner
    assert (sparse.config.model.pattern, inner.every, inner.expert) == (pattern, every, "linear")
    expected = logits(restore(source, CPU))
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        statistics = sparse.model(tokens()).statistics
    routers = 1 if inner.router == "shared" else len(inner.projections)
    assert len(statistics) == routers * 2 // every
    for name, router in statistics.items():
        assert (router.assigned > 0).sum() > sparse.config.moe.top_k, name


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_routers_of_channels_spread_tokens_whatever_the_channels_size(
    dense: Callable[..., Path], tmp_path: Path, size: float
) -> None:
    """C and D make what the output projection reads larger, which makes up for it: the same function."""
    source = restore(dense(), CPU)
    with torch.no_grad():
        for layer in source.model.layers[::2]:
            layer.mixer.D *= size
            layer.mixer.x_proj.weight[-source.config.model.d_state :] *= size
            layer.mixer.out_proj.weight /= size
    write_starting_point(tmp_path / "dense", source.config, BytesTokenizer(), weight_shards(source.model))
    sparse = upcycled(tmp_path / "dense", tmp_path / "run", inner={"projections": ["out"]})
    expected = logits(restore(dense(), CPU))
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        statistics = sparse.model(tokens()).statistics
    assert all((router.assigned > 0).sum() > 1 for router in statistics.values())


def test_noise_tells_experts_inside_mamba_apart(dense: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"top_k": 2, "inner": {"projections": PROJECTIONS, "router": "shared"}}
    plain, noisy = (upcycled(dense(), tmp_path / name, noise, **keys) for name, noise in (("a", 0.0), ("b", 0.01)))
    difference = (logits(noisy) - logits(plain)).abs().max()
    assert 1e-4 < difference < 0.1 * logits(plain).abs().max()
    for name, shape in (("conv", (4, 16, 32)), ("gate", (4, 16, 32)), ("out", (4, 32, 16))):
        copies, experts = (
            weights(run.path.parents[1])[f"weights/layers.0.mixer.{name}_experts.weight"] for run in (plain, noisy)
        )
        assert copies.shape == shape and torch.equal(copies, copies[:1].expand_as(copies))
        added = (experts - copies) / copies[0].square().mean().sqrt()
        assert added.std().item() == pytest.approx(0.01, rel=0.1)
        assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.2


def test_noise_tells_experts_apart_and_changes_little(dense: Callable[..., Path], tmp_path: Path) -> None:
    plain, noisy, again = (
        upcycled(dense(), tmp_path / name, noise, top_k=2)
        for name, noise in (("plain", 0.0), ("noisy", 0.01), ("again", 0.01))
    )
    assert torch.equal(logits(noisy), logits(again))
    difference = (logits(noisy) - logits(plain)).abs().max()
    assert 1e-4 < difference < 0.1 * logits(plain).abs().max()
    for name, width in (("in_proj", 16), ("out_proj", 48)):
        copies = weights(plain.path.parents[1])[f"weights/layers.1.mixer.experts.{name}"]
        experts = weights(noisy.path.parents[1])[f"weights/layers.1.mixer.experts.{name}"]
        assert copies.shape[:2] == (4, width)
        assert torch.equal(copies, copies[:1].expand_as(copies))
        added = (experts - copies) / copies[0].square().mean().sqrt()
        assert added.std().item() == pytest.approx(0.01, rel=0.1)
        assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.2


def test_one_layer_in_several_is_replaced(dense: Callable[..., Path], tmp_path: Path) -> None:
    half = upcycled(dense(), tmp_path / "run", every=2)
    assert (half.config.model.pattern, half.config.model.repeat) == ("M-ME", 1)
    expected = logits(restore(dense(), CPU))
    torch.testing.assert_close(logits(half), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("keys", "scale"), [({}, 8), ({"top_k": 2, "renormalize": False}, 4), ({"top_k": 2}, 1)])
def test_the_output_makes_up_for_small_weights(keys: dict[str, Any], scale: float) -> None:
    assert output_scale(routing(experts=8, **keys)) == scale


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        ({}, {}),
        ({"top_k": 2}, {}),
        ({}, {"ranks": 2, "parallel__tensor": 2, "parallel__expert": 2}),
        ({"inner": {"projections": PROJECTIONS, "router": "shared"}}, {"ranks": 2, "parallel__expert": 2}),
    ],
    ids=["switch", "top 2", "switch, TP 2, EP 2", "inside Mamba, EP 2"],
)
def test_training_starts_where_the_dense_model_stands(
    world: World, trained: Path, tmp_path: Path, keys: dict[str, Any], layout: dict[str, Any]
) -> None:
    upcycled(trained, tmp_path / "start", **keys)
    start = {"train__learning_rate": 3e-3, "train__validate_every": 0, "train__sample_tokens": 0}
    config = tmp_path / "start" / "config.yaml"
    losses = curve(
        run(
            world,
            config,
            tmp_path / "run",
            train__warm_start=str(tmp_path / "start"),
            train__steps=10,
            **start,
            **layout,
        )
    )
    config = trained / "config.yaml"
    first = run(world, config, tmp_path / "dense", train__warm_start=str(trained), train__steps=1, **start)
    assert losses[0] == pytest.approx(curve(first)[0], rel=1e-5)
    assert losses[-1] < losses[0] - 0.02


def test_it_is_no_run_to_go_on_with(world: World, dense: Callable[..., Path], tmp_path: Path) -> None:
    upcycled(dense(), tmp_path / "run")
    with pytest.raises(WorkerError, match=r"holds weights to start from.*--run\.folder=.*run-2 --train\.warm_start="):
        run(world, tmp_path / "run" / "config.yaml", tmp_path / "run")


def test_the_command_says_how_to_go_on(
    dense: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    main(str(dense()), output, experts=4)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"as ME x 2, 4 experts per layer, in {output}/checkpoints/step-00000000")
    assert said[1].endswith(f"--config {output}/config.yaml --run.folder={output}-2 --train.warm_start={output}")
    with pytest.raises(UserError, match="not empty"):
        main(str(dense()), output, experts=4)
    main(str(dense()), output, experts=8, overwrite=True)
    assert restore(output, CPU).config.moe.experts == 8
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    capsys.readouterr()
    main(str(dense()), output, 4, projections=["conv", "out"], inner_router="shared", every=2, overwrite=True)
    assert "as M- x 2, 4 experts per projection (conv, out), in" in capsys.readouterr().out
    inner = restore(output, CPU).config.moe.inner
    assert (inner.projections, inner.router, inner.every) == (["conv", "out"], "shared", 2)
    with pytest.raises(UserError, match="--inner_router=own without --projections: name what"):
        main(str(dense()), output, 4, inner_router="own", overwrite=True)


def test_bad_input_is_one_line(dense: Callable[..., Path], plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"model\.pattern=ME has experts"):
        upcycle(plain, output, routing(experts=4))
    with pytest.raises(UserError, match=r"M- x 2 has 2 feed-forward layers \(-\), and one in 3"):
        upcycle(dense(), output, routing(experts=4), every=3)
    inside = {"projections": ["out"]}
    with pytest.raises(UserError, match=r"M- x 2 has 2 Mamba layers \(M\), and one in 3 gets them inside"):
        upcycle(dense(), output, routing(experts=4, inner=inside), every=3)
    with pytest.raises(UserError, match=r"\*- x 2 has 0 Mamba layers"):
        upcycle(dense("*-", "swiglu"), output, routing(experts=4, inner=inside))
    with pytest.raises(UserError, match=r"model\.pattern=M has experts already"):
        routed = Config(model={"pattern": "M"}, moe={"inner": inside})
        upcycled_config(routed, routing(experts=4, inner=inside))
    with pytest.raises(UserError, match=r"moe\.inner\.expert=switch: .* set linear"):
        upcycle(dense(), output, routing(experts=4, inner=inside | {"expert": "switch"}))
    with pytest.raises(UserError, match=r"add out, or set moe\.inner\.router=own"):
        routing(experts=4, inner={"projections": ["conv"], "router": "shared"})
    with pytest.raises(UserError, match=r"model\.mlp_bias=true: experts have no biases"):
        upcycled_config(Config(model={"pattern": "M-", "mlp_bias": True}), routing(experts=4))
    with pytest.raises(UserError, match=r"moe\.top_k=2 with moe\.router=switch"):
        routing(experts=4, top_k=2, router="switch")
    with pytest.raises(UserError, match="renormalize=true"):
        routing(experts=4, renormalize=True)
    with pytest.raises(UserError, match=r"exceeds moe\.experts"):
        routing(experts=2, top_k=3)
    with pytest.raises(UserError, match="not a folder"):
        upcycle(tmp_path / "nothing", output, routing(experts=4))
    with pytest.raises(UserError, match="which is an input"):
        upcycle(dense(), dense(), routing(experts=4), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder: give another name"):
        upcycle(dense(), tmp_path / "file", routing(experts=4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(UserError, match=r"holds no config\.yaml, so"):
        upcycle(dense(), tmp_path / "other", routing(experts=4), overwrite=True)
    assert not output.exists()


def test_a_run_at_work_is_not_replaced(dense: Callable[..., Path], tmp_path: Path) -> None:
    upcycled(dense(), tmp_path / "run")
    with RunFolder(tmp_path / "run").locked(), pytest.raises(UserError, match="in use by another run"):
        upcycle(dense(), tmp_path / "run", routing(experts=4), overwrite=True)
