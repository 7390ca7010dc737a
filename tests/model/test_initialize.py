import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.moe import Experts

Tiny = Callable[..., LanguageModel]


def test_weights_depend_only_on_seed_and_name(tiny: Tiny) -> None:
    one, same, other = tiny("ME"), tiny("ME"), tiny("ME", seed=1)
    longer = tiny("ME", repeat=2)
    longer_weights = dict(longer.named_parameters())
    for (name, weight), copy, changed in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, copy), name
        if "out_proj" not in name:  # those are smaller in a deeper model
            assert torch.equal(weight, longer_weights[name]), name
        if weight.dim() > 1 and "A_log" not in name:
            assert not torch.equal(weight, changed), name


def test_order_of_modules_does_not_matter() -> None:
    def build(first: bool) -> nn.ModuleDict:
        names = ["a", "b"] if first else ["b", "a"]
        return nn.ModuleDict({name: Experts(ModelConfig(d_model=8), 3, 5) for name in names})

    one, two = build(True), build(False)
    initialize(one, 7)
    initialize(two, 7)
    for name in "ab":
        assert torch.equal(one[name].in_proj, two[name].in_proj)
    assert not torch.equal(one["a"].in_proj, one["b"].in_proj)


def test_meta_device_and_other_dtypes_give_the_same_weights(tiny: Tiny) -> None:
    moe = {"balance": "bias", "experts": 4}
    wanted = tiny("M*-E", moe=moe)
    with torch.device("meta"):
        model = LanguageModel(wanted.config, wanted.moe_config)
    model.to_empty(device="cpu").double()
    initialize(model, 0)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.double()), name


def test_default_spreads() -> None:
    config = ModelConfig(pattern="*E", repeat=2, d_model=64, vocab_size=500)
    model = LanguageModel(config, MoEConfig(experts=4))
    initialize(model, 0)
    attention, moe = model.layers[0].mixer, model.layers[1].mixer
    fan_in = 1 / math.sqrt(3 * 64)
    stds = {
        attention.q_proj.weight: fan_in,
        attention.o_proj.weight: fan_in / 2,
        moe.experts.in_proj: fan_in,
        moe.experts.out_proj: 1 / math.sqrt(3 * 256) / 2,
        moe.router.weight: 0.88 * math.sqrt(0.1 / 64),  # truncated at two std
        model.embedding.weight: 0.02,
        model.head.weight: 0.02,
    }
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item()) < std / 5


def test_authors_spreads() -> None:
    config = ModelConfig(pattern="*E-M", repeat=1, d_model=64, vocab_size=500, initialization="authors")
    model = LanguageModel(config, MoEConfig(experts=4))
    initialize(model, 0)
    attention, moe, dense, mamba = (layer.mixer for layer in model.layers)
    fan_ins = {
        attention.o_proj.weight: 64,
        moe.experts.in_proj: 64,
        moe.experts.out_proj: 256,
        moe.router.weight: 64,
        dense.out_proj.weight: 256,
        model.embedding.weight: 1,
        model.head.weight: 64,
    }
    for weight, fan_in in fan_ins.items():
        assert weight.std().item() == pytest.approx(0.88 * math.sqrt(0.1 / fan_in), rel=0.1)
        assert weight.abs().max().item() <= 2 * math.sqrt(0.1 / fan_in)
    assert mamba.in_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)


def test_a_forgotten_parameter_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no initializer for weight"):
        initialize(nn.Linear(2, 2, bias=False), 0)
