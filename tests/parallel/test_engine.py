from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import buckets
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.optimizer import AdamW, parameter_groups
from moe_mamba.parallel.parallelize import cast_to_bf16
from moe_mamba.parallel.topology import World as Ranks
from tests.parallel.layouts import Layout, Trained, assemble, config_of, train
from tests.parallel.test_parity import worst
from tests.world import World


def decayed(**keys: object) -> dict[str, tuple[float, torch.dtype]]:
    """Name -> weight decay and dtype, as the groups have them."""
    config = load_config(None, {"model.pattern": "ME*-", "model.repeat": 1, "model.d_model": 32, **keys})
    model = LanguageModel(config.model, config.moe)
    if config.train.precision == "bf16":
        cast_to_bf16(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    for group in groups:
        assert len({parameter.dtype for parameter in group["params"]}) == 1
    assert groups[0]["params"][0].dtype == min((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    return {names[id(p)]: (group["weight_decay"], p.dtype) for group in groups for p in group["params"]}


def test_matrices_decay_and_nothing_else() -> None:
    found = decayed(**{"model.attention_bias": True, "model.mlp_bias": True})
    plain = {name for name, (decay, _) in found.items() if decay == 0}
    assert all(name.endswith(("norm.weight", ".bias", ".D", "A_log")) for name in plain)
    assert {"embedding.weight", "head.weight", "layers.0.mixer.in_proj.weight"} <= found.keys() - plain
    assert {"layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_proj.bias"} <= plain
    assert {"layers.2.mixer.q_proj.bias", "layers.2.mixer.o_proj.bias", "layers.3.mixer.in_proj.bias"} <= plain


def test_the_authors_decay_everything() -> None:
    assert {decay for decay, _ in decayed(**{"train.decay_all": True}).values()} == {0.1}


def test_bf16_groups_come_first_and_fp32_stays() -> None:
    found = decayed(**{"train.precision": "bf16", "model.attention_bias": True, "model.mlp_bias": True})
    fp32 = {name for name, (_, dtype) in found.items() if dtype == torch.float32}
    assert {"layers.0.mixer.A_log", "layers.1.mixer.router.weight", "layers.0.norm.weight"} <= fp32
    assert not {"layers.0.mixer.in_proj.weight", "layers.2.mixer.o_proj.bias", "layers.3.mixer.in_proj.bias"} & fp32


def test_designs_keep_their_routers_in_fp32_and_their_experts_decay() -> None:
    inner = {"moe.inner.projections": "conv,gate,out", "moe.inner.every": 2}
    found = decayed(**{"train.precision": "bf16", "model.pattern": "(ME)M", **inner})
    fp32 = {name for name, (_, dtype) in found.items() if dtype == torch.float32}
    routers = {
        "layers.0.mixer.1.router.weight",
        "layers.1.mixer.conv_router.weight",
        "layers.1.mixer.out_router.weight",
    }
    assert routers | {"layers.0.mixer.0.A_log", "layers.1.mixer.A_log", "layers.1.mixer.dt_proj.bias"} <= fp32
    experts = {f"layers.1.mixer.{name}_experts.weight" for name in ("conv", "gate", "out")}
    assert experts <= found.keys() - fp32
    assert {found[name][0] for name in experts | routers} == {0.1}
    assert {found[name][0] for name in ("layers.0.mixer.0.A_log", "layers.1.mixer.A_log", "layers.1.mixer.D")} == {0.0}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("device", "ranks"), [("cpu", 2), ("cuda", 2), ("cuda", 1)])
def test_zero_reduces_beside_the_backward_pass_on_several_gpus(
    zero: int, device: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, {"parallel.zero": zero, "model.pattern": "M-", "model.d_model": 32})
    with torch.device("meta"):
        model = LanguageModel(config.model, config.moe)
        large = nn.Parameter(torch.empty(buckets.BUCKET + 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    several, processes = device == "cuda" and ranks > 1, Ranks(0, ranks, 0, ranks)
    assert engines._zero_settings(model, config, processes)["overlap_comm"] is (several and zero > 0)
    model.extra = large
    settings = engines._zero_settings(model, config, processes)
    assert settings["overlap_comm"] is (several and zero == 3), "its gradient fits in no bucket"


def train_in_small_buckets(config: Config, steps: int, beside: bool) -> Trained:
    """In a worker: train with buckets that are full before a backward pass ends, reduced as on a GPU or not."""
    with (
        mock.patch.object(engines, "_reduces_beside_backward", return_value=beside),
        mock.patch.object(buckets, "BUCKET", 4096),
    ):
        return train(config, steps)


OFFLOAD = {"parallel__offload_optimizer": True}


@pytest.mark.parametrize(
    ("pattern", "layout", "beside", "keys"),
    [
        ("ME", Layout(4, 2, 2), True, {}),
        ("M-", Layout(2, zero=2), False, OFFLOAD),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ME", Layout(4, 2, 2), True, {"train__precision": "bf16"}),
                ("ME", Layout(4, 2, 2, zero=2), True, {}),
                ("ME", Layout(4, 2, 2, zero=2), True, {"train__precision": "bf16"} | OFFLOAD),
                ("M-", Layout(4, 2, zero=3), True, {}),
                ("M-", Layout(2, zero=3), False, OFFLOAD),
            )
        ),
    ],
    ids=str,
)
def test_buckets_that_are_full_during_a_backward_pass_train_alike(
    world: World, pattern: str, layout: Layout, beside: bool, keys: dict[str, Any]
) -> None:
    """What NCCL's streams would do is not seen here, but which gradients travel, when, and where their sums go."""
    config = config_of(pattern, layout, 3, train__learning_rate=1e-4, **keys)
    plain = world.run(train, config, 3, ranks=layout.ranks)
    found = world.run(train_in_small_buckets, config, 3, beside, ranks=layout.ranks)
    bound = 1e-2 if config.train.precision == "bf16" else 1e-5
    assert found[0].norms == pytest.approx(plain[0].norms, rel=bound)
    error, name = worst(*(assemble([rank.gradients for rank in ranks]) for ranks in (found, plain)))
    assert error <= bound, name


def test_adamw_is_torchs() -> None:
    """Only without what torch.compile would want of it: values, state and what it saves are the same to the bit."""
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optimizer = kind([{"params": parameters[:1], "weight_decay": 0.1}], lr=0.1, betas=(0.8, 0.9))
        optimizer.add_param_group({"params": parameters[1:], "weight_decay": 0.0})
        for _ in range(3):
            sum(parameter.square().sum() for parameter in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any(parameter.grad for parameter in parameters)
        found.append((parameters, optimizer.state_dict()))
    (ours, state), (theirs, their_state) = found
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert state["param_groups"] == their_state["param_groups"]
    for place, kept in their_state["state"].items():
        assert all(torch.equal(state["state"][place][key], value) for key, value in kept.items())
