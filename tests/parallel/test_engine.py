import torch

from moe_mamba.config_file import load_config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.optimizer import AdamW, parameter_groups
from moe_mamba.parallel.parallelize import cast_to_bf16


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
