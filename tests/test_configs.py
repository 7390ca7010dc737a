"""Every configuration that ships loads, and the paper's ones say what the paper says."""

import pytest

from moe_mamba.config_file import load_config
from tests import ROOT

CONFIGS = ROOT / "configs"
FILES = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if path.parent.name != "reproduce"
)  # those of tables are read by tests/reproduce/test_experiment.py

# name: pattern, repeat, d_model, hidden width beside the mixer, experts, learning rate
V2 = {
    "transformer_25m": ("*-", 8, 512, 2048, None, 5e-4),
    "transformer_moe_25m": ("*E", 8, 512, 2048, 32, 5e-4),
    "mamba_25m": ("M", 16, 512, None, None, 1e-3),
    "mamba_mlp_25m": ("M-", 8, 512, 1536, None, 1e-3),
    "moe_mamba_25m": ("ME", 8, 512, 1536, 42, 5e-4),
    "mamba_100m": ("M", 32, 768, None, None, 1e-3),
    "transformer_moe_100m": ("*E", 16, 768, 3072, 32, 2.5e-4),
    "moe_mamba_100m": ("ME", 16, 768, 2304, 42, 5e-4),
}
V1 = {f"{name}_v1": (*row[:4], row[4] and 32, 1e-3) for name, row in V2.items() if name.endswith("25m")}
DESIGNS = {
    "paper/moe_mamba_parallel_25m": ("(ME)", 8, 512, 1536, 42, 5e-4),
    "paper/moe_mamba_inner_25m": ("M", 16, 512, None, None, 5e-4),
    "kin/routing_mamba_25m": ("M", 16, 512, None, None, 5e-4),
}


@pytest.mark.parametrize("file", FILES)
def test_loads(file: str) -> None:
    load_config(CONFIGS / file)


@pytest.mark.parametrize("name", [*V2, *V1, *DESIGNS])
def test_paper_values(name: str) -> None:
    pattern, repeat, d_model, width, experts, rate = (V2 | V1 | DESIGNS)[name]
    config = load_config(CONFIGS / (f"{name}.yaml" if name in DESIGNS else f"paper/{name}.yaml"))
    model, moe, train = config.model, config.moe, config.train
    assert (model.pattern, model.repeat, model.d_model, model.vocab_size) == (pattern, repeat, d_model, 50257)
    assert (train.learning_rate, train.warmup, train.gradient_clip, train.weight_decay) == (rate, 0.01, 0.5, 0.1)
    assert (train.schedule, train.minimum_rate, train.beta1, train.beta2) == ("cosine", 0.1, 0.9, 0.999)
    sizes = (config.data.sequence_length, train.global_batch, config.steps)
    assert sizes == (
        (256, 256, 100_000)
        if name in V1
        else (1024, 1024 if "100m" in name else 64, 30_000 if "100m" in name else 150_000)
    )
    if "*" in pattern:
        assert (model.heads, model.positions, model.rope_base) == (d_model // 64, "rope", 10000)
    if "M" in pattern:
        assert (model.d_state, model.d_conv, model.expand, model.resolved_dt_rank) == (16, 4, 2, d_model // 16)
    if "-" in pattern:
        assert (model.resolved_d_ff, model.activation) == (width, "relu")
    if "E" in pattern:
        assert (moe.experts, moe.d_expert or model.resolved_d_ff, model.activation) == (experts, width, "relu")
        assert (moe.router, moe.capacity_factor, moe.balance_weight, moe.z_loss_weight) == ("switch", 1.0, 0.01, 0)
    assert (config.data.tokenizer, config.data.reset_at_document, model.tied_head) == ("gpt2", False, False)
    assert list(config.data.train_weights) == ["hf:allenai/c4:en:train"]
    assert list(config.data.validation_sets.values()) == ["hf:allenai/c4:en:validation"]


def test_mixtures_inside_mamba() -> None:
    published = load_config(CONFIGS / "paper/moe_mamba_inner_25m.yaml").moe
    inner, routing = published.inner, published.inner_routing
    assert (inner.projections, inner.every, inner.router, inner.expert) == (["gate"], 2, "own", "switch")
    assert (routing.experts, routing.d_expert, routing.top_k) == (16, 344, 1)
    assert (routing.router, routing.capacity_factor, routing.balance_weight) == ("switch", 1.0, 0.01)
    kin = load_config(CONFIGS / "kin/routing_mamba_25m.yaml").moe
    inner, routing = kin.inner, kin.inner_routing
    assert (sorted(inner.projections), inner.every) == (["conv", "gate", "out"], 1)
    assert (inner.router, inner.expert) == ("shared", "linear")
    assert (routing.experts, routing.top_k, routing.capacity_factor) == (8, 1, None)
