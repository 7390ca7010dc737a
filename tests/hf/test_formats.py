"""The tables of formats: each tensor is made up once, names are the hub's, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.errors import UserError
from moe_mamba.hf.formats import FORMATS, NATIVE, OWN, detect
from moe_mamba.hf.formats.settings import notes
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import RouterStatistics, balance_loss

SIZES = {"repeat": 1, "d_model": 16, "vocab_size": 32, "d_state": 4, "heads": 4, "d_ff": 24}
SWIGLU: dict[str, Any] = {"kv_heads": 2, "activation": "swiglu"}
JAMBA: dict[str, Any] = SWIGLU | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
TOP_2: dict[str, Any] = {"router": "top_k", "top_k": 2}
MIXTRAL = TOP_2 | {"renormalize": True}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
INNER: dict[str, Any] = {"inner": {"projections": ["conv", "out"]}}
LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 16}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("moe_mamba", {"pattern": "MEM-*E", "d_inner": 21, "norm": "layernorm"}, {"shared_experts": 1, "balance": "bias"}),
    ("moe_mamba", {"pattern": "M", "tied_head": True, "final_norm": False, "selective": False}, {}),
    ("moe_mamba", {"pattern": "(*E)-", "repeat": 2}, {"shared_experts": 1}),
    ("moe_mamba", {"pattern": "M(ME)"}, {"inner": {"projections": ["gate"], "every": 2, "balance": "bias"}}),
    ("moe_mamba", {"pattern": "M"}, {"inner": {"projections": ["conv", "gate", "out"], "router": "shared"}}),
    ("mamba", {"pattern": "M", "repeat": 3, "d_conv": 3, "expand": 3, "dt_rank": 5}, {}),
    ("mamba", {"pattern": "M", "repeat": 2, "tied_head": True, "d_inner": 48}, {}),
    ("llama", {"pattern": "*-", "repeat": 2, "rope_base": 100.0, **SWIGLU}, {}),
    ("llama", {"pattern": "*-", "repeat": 2, "head_dim": 6, **SWIGLU, **BIASES, **LLAMA_3}, {}),
    ("llama", {"pattern": "*-", "rope_type": "linear", "rope_factor": 2.5, **SWIGLU, "attention_bias": True}, {}),
    ("mistral", {"pattern": "*-", "repeat": 2, "sliding_window": 5, **SWIGLU}, {}),
    ("mistral", {"pattern": "*-", "sliding_window": 9, "d_model": 18, "head_dim": 4, **SWIGLU, **LLAMA_3}, {}),
    ("mixtral", {"pattern": "*E", "repeat": 2, **SWIGLU}, MIXTRAL),
    ("mixtral", {"pattern": "*E", "sliding_window": 3, "head_dim": 2, **SWIGLU}, MIXTRAL | {"top_k": 3}),
    ("jamba", {"pattern": "M-ME*-ME", **JAMBA}, TOP_2),
    ("jamba", {"pattern": "*EM-", "repeat": 2, "d_inner": 16, **JAMBA}, {}),
    ("jamba", {"pattern": "*-M-", "tied_head": True, **JAMBA}, {}),
]


def build(keys: dict[str, Any], moe: dict[str, Any]) -> tuple[ModelConfig, MoEConfig]:
    return ModelConfig(**{**SIZES, **keys}), MoEConfig(**{"experts": 4, "capacity_factor": None, **moe})


def weights(model: ModelConfig, moe: MoEConfig) -> dict[str, torch.Tensor]:
    """Every tensor of ours, zeros."""
    return {name: torch.zeros_like(tensor) for name, tensor in LanguageModel(model, moe).state_dict().items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("name", "keys", "moe"), MODELS)
def test_entries_make_up_each_tensor_once(name: str, keys: dict, moe: dict, stacked: bool) -> None:
    model, experts = build(keys, moe)
    ours = weights(model, experts)
    order = []
    for entry in FORMATS[name].entries(model, experts, stacked):
        view = entry.view(ours[entry.ours])
        assert view.untyped_storage().data_ptr() == ours[entry.ours].untyped_storage().data_ptr(), entry
        view.add_(1)
        order.append(entry.ours)
    for name, tensor in ours.items():
        assert (tensor == 1).all(), name
    assert [a for a, b in zip(order, [None, *order], strict=False) if a != b] == list(dict.fromkeys(order))


@pytest.mark.parametrize(("name", "keys", "moe"), MODELS)
def test_what_is_written_is_read(name: str, keys: dict, moe: dict) -> None:
    model, experts = build(keys, moe)
    assert OWN.refusal(model, experts) is None
    format = {"moe_mamba": OWN, **NATIVE}[name]
    assert format.refusal(model, experts) is None
    configuration = json.loads(json.dumps(format.configuration(model, experts)))
    assert detect(configuration) is format
    found_model, found_experts = format.read(configuration)
    assert found_model.layers == model.layers
    if format is OWN:
        assert (found_model, found_experts) == (model, experts)
    for key in ("d_model", "vocab_size", "norm_epsilon", "tied_head", "activation"):
        if key != "activation" or "-" in model.layers or "E" in model.layers:
            assert getattr(found_model, key) == getattr(model, key), key
    attention = ["sliding_window", "attention_bias", "resolved_head_dim", *(k for k in vars(model) if "rope" in k)]
    for key in attention if "*" in model.layers else ():
        assert getattr(found_model, key) == getattr(model, key), key
    assert {name: tensor.shape for name, tensor in weights(found_model, found_experts).items()} == {
        name: tensor.shape for name, tensor in weights(model, experts).items()
    }
    if "E" in model.layers:
        for key in ("top_k", "renormalize", "balance", "balance_weight"):
            assert getattr(found_experts, key) == pytest.approx(getattr(experts, key)), key


@pytest.mark.parametrize(("name", "keys", "moe"), [case for case in MODELS if case[0] != "moe_mamba"])
def test_names_and_shapes_are_those_that_transformers_writes(name: str, keys: dict, moe: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, experts = build(keys, moe)
    config = transformers.AutoConfig.for_model(**NATIVE[name].configuration(model, experts), pad_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
    ours = weights(model, experts)
    entries = NATIVE[name].entries(model, experts)
    assert {entry.theirs: tuple(entry.view(ours[entry.ours]).shape) for entry in entries} == expected


@pytest.mark.parametrize(
    ("name", "keys", "moe", "says"),
    [
        ("mamba", {"pattern": "ME"}, {}, "layer 1 is mixture of experts (E), which MambaForCausalLM lacks"),
        ("mamba", {"pattern": "M(MM)"}, {}, "layer 1 is Mamba (M) and Mamba (M), which MambaForCausalLM lacks"),
        (
            "mamba",
            {"pattern": "M"},
            INNER,
            "moe.inner.projections=conv,out: MambaForCausalLM has no Mamba with experts",
        ),
        ("llama", {"pattern": "(*-)", **SWIGLU}, {}, "layer 0 is attention (*) and feed-forward (-), which Llama"),
        ("mistral", {"pattern": "*-(*-)-", **SWIGLU}, {}, "layer 2 is attention (*) and feed-forward (-), which"),
        (
            "mixtral",
            {"pattern": "(*E)", **SWIGLU},
            MIXTRAL,
            "layer 0 is attention (*) and mixture of experts (E), which",
        ),
        (
            "jamba",
            {"pattern": "(M*)-*E", **JAMBA},
            {},
            "layer 0 is Mamba (M) and attention (*), where JambaForCausalLM",
        ),
        ("jamba", {"pattern": "M(-E)*E", **JAMBA}, {}, "layer 1 is feed-forward (-) and mixture of experts (E), where"),
        ("jamba", {"pattern": "M-*E", **JAMBA}, INNER, "moe.inner.projections=conv,out: JambaForCausalLM has no Mamba"),
        ("mamba", {"pattern": "M", "mamba_norms": True}, {}, "mamba_norms=true"),
        ("mamba", {"pattern": "M", "norm": "layernorm"}, {}, "norm=layernorm"),
        ("mamba", {"pattern": "M", "final_norm": False}, {}, "final_norm=false"),
        ("mamba", {"pattern": "M", "selective": False}, {}, "selective=false"),
        ("mamba", {"pattern": "M", "d_inner": 24}, {}, "d_inner=24: MambaForCausalLM has whole multiples of model.d_m"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "d_inner": 21}, {}, "d_inner=21: JambaForCausalLM has whole multiples"),
        ("llama", {"pattern": "*-*M", **SWIGLU}, {}, "layer 3 is Mamba (M), which LlamaForCausalLM lacks"),
        ("llama", {"pattern": "*--*", **SWIGLU}, {}, "layer 2 is feed-forward (-): LlamaForCausalLM has * and -"),
        ("llama", {"pattern": "*-*", **SWIGLU}, {}, "layer 2 is attention (*), the last"),
        ("llama", {"pattern": "*-", "activation": "relu"}, {}, "activation=relu"),
        ("llama", {"pattern": "*-", **SWIGLU, "positions": "none"}, {}, "positions=none"),
        ("llama", {"pattern": "*-", **SWIGLU, "sliding_window": 8}, {}, "sliding_window=8: LlamaForCausalLM has none"),
        ("llama", {"pattern": "*-", **SWIGLU, "d_model": 18, "head_dim": 4}, {}, "d_model=18: LlamaForCausalLM wants"),
        ("mistral", {"pattern": "*-", **SWIGLU, **BIASES}, {}, "attention_bias=true: MistralForCausalLM has none"),
        ("mistral", {"pattern": "*-", **SWIGLU, "mlp_bias": True}, {}, "mlp_bias=true: MistralForCausalLM has none"),
        ("mixtral", {"pattern": "*E", **SWIGLU, "attention_bias": True}, MIXTRAL, "attention_bias=true"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "sliding_window": 8}, {}, "sliding_window=8"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "mlp_bias": True}, {}, "mlp_bias=true"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "head_dim": 6}, {}, "head_dim=6: JambaForCausalLM of Transformers 4"),
        ("mixtral", {"pattern": "*E*-", **SWIGLU}, MIXTRAL, "layer 3 is feed-forward (-)"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, TOP_2, "renormalize=false"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, {}, "renormalize=false"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, MIXTRAL | {"scores": "sigmoid"}, "scores=sigmoid"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, MIXTRAL | {"shared_experts": 1}, "shared_experts=1"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, MIXTRAL | {"balance": "bias"}, "balance=bias"),
        ("mixtral", {"pattern": "*E", **SWIGLU}, MIXTRAL | {"evaluation_capacity": 1.0}, "evaluation_capacity=1.0"),
        ("jamba", {"pattern": "ME", **JAMBA}, {}, "no layer is attention (*): without one, Transformers'"),
        ("jamba", {"pattern": "MM-", **JAMBA}, {}, "layer 1 is Mamba (M), where JambaForCausalLM has - or E"),
        ("jamba", {"pattern": "M-*", **JAMBA}, {}, "layer 2 is attention (*), the last"),
        ("jamba", {"pattern": "*-M-*-*-", **JAMBA}, {}, "attention at layers 0, 4, 6"),
        ("jamba", {"pattern": "*EM-M-ME*E", **JAMBA}, {}, "experts at layers 1, 7, 9"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "mamba_norms": False}, {}, "mamba_norms=false"),
        ("jamba", {"pattern": "M-*-", **JAMBA, "positions": "rope"}, {}, "positions=rope"),
        ("jamba", {"pattern": "M-*E", **JAMBA}, {"d_expert": 8}, "d_expert=8 beside model.d_ff=24"),
        ("jamba", {"pattern": "ME*E", **JAMBA}, {"experts": 1}, "experts=1"),
        ("jamba", {"pattern": "ME*E", **JAMBA}, MIXTRAL, "renormalize=true"),
        ("jamba", {"pattern": "ME*E", **JAMBA}, {"router": "expert_choice", "capacity_factor": 1.0}, "expert_choice"),
    ],
)
def test_what_a_class_cannot_hold_is_refused(name: str, keys: dict, moe: dict, says: str) -> None:
    refusal = NATIVE[name].refusal(*build(keys, moe))
    assert refusal is not None and says in refusal


THEIRS: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2},
    "llama": {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "state_spaces": {"d_model": 16, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}},
}
THEIRS["moe_mamba"] = {"model_type": "moe_mamba"}
THEIRS["mistral"] = THEIRS["llama"] | {"model_type": "mistral", "num_key_value_heads": 2}
THEIRS["mixtral"] = THEIRS["mistral"] | {"model_type": "mixtral"}
THEIRS["jamba"] = THEIRS["mistral"] | {"model_type": "jamba"}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mamba", {"use_bias": True}, "use_bias=True"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("mamba", {"intermediate_size": 48}, "intermediate_size=48"),
        ("mamba", {"hidden_size": None}, "hidden_size is missing"),
        ("mamba", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ("mamba", {"time_step_rank": "some"}, "time_step_rank is 'some', but must be a whole number"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', but must be true or false"),
        ("llama", {"head_dim": 7}, "model.head_dim = 7 is odd"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type='dynamic' cannot be read"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type='yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type='longrope'"),
        ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type=['linear'] cannot be read"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_scaling.factor is missing, but must be a number above 0",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "type='dynamic'"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "has the key rope_scaling.factor=2.0, which is unknown"),
        ("llama", {"rope_parameters": SCALED | {"low_freq_factor": None}}, "low_freq_factor is missing"),
        ("llama", {"rope_parameters": SCALED | {"low_freq_factor": 4.0}}, "rope_low_freq_factor=4 is not below"),
        ("llama", {"rope_parameters": SCALED | {"beta": 1.0}}, "has the key rope_parameters.beta=1.0"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_theta=1000000.0 cannot be read"),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": SCALED | {"factor": 2.0}}, "contradict each other"),
        ("llama", {"original_max_position_embeddings": 8192}, "the key original_max_position_embeddings=8192"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', but must be a number above 0"),
        ("llama", {"sliding_window": 4096}, "has the key sliding_window=4096, which is unknown for LlamaForCausalLM"),
        ("mistral", {"attention_bias": True}, "has the key attention_bias=True"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, but must be a whole number from 1"),
        ("mistral", {"layer_types": ["full_attention"]}, "has the key layer_types=['full_attention']"),
        ("llama", {"rope_parameters": 3}, "rope_parameters is 3, but must be an object"),
        ("llama", {"rope_scaling": ["linear"]}, "rope_scaling is ['linear']"),
        ("llama", {"hidden_size": 18}, "not divisible by model.heads=4"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("mixtral", {"num_experts": 8}, "has the key num_experts=8"),
        ("mixtral", {"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1, but must be a number of at least 0"),
        ("jamba", {"sliding_window": 64}, "has the key sliding_window=64"),
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms=False"),
        ("moe_mamba", {"moe": 3}, "moe is 3"),
        ("moe_mamba", {"moe": {"expert_bias": True}}, "has the key moe.expert_bias=True"),
        ("moe_mamba", {"moe": {"inner": {"gates": 2}}}, "has the key moe.inner.gates=2, which is unknown"),
        ("moe_mamba", {"moe": {"inner": ["conv"]}}, "moe.inner is ['conv'], but must be an object"),
        ("moe_mamba", {"moe": {"inner": {"projections": ["up"]}}}, "inner.projections.0 Input should be 'conv'"),
        ("moe_mamba", {"tie_word_embeddings": True}, "tie_word_embeddings=True cannot be read: tied_head=False"),
        ("mamba", {"n_layer": 3}, "n_layer=3 cannot be read: the keys of Transformers say otherwise"),
        ("state_spaces", {"ssm_cfg": {"ngroups": 8}}, "has the key ssm_cfg.ngroups=8"),
        ("state_spaces", {"ssm_cfg": []}, "ssm_cfg is []"),
        ("state_spaces", {"ssm_cfg": {"layer": "Mamba2"}}, "layer='Mamba2'"),
        ("state_spaces", {"attn_layer_idx": [1]}, "attn_layer_idx=[1]"),
        ("state_spaces", {"d_intermediate": 64}, "d_intermediate=64"),
    ],
)
def test_what_ours_cannot_hold_is_refused(name: str, keys: dict, says: str) -> None:
    configuration = THEIRS[name] | keys
    with pytest.raises(UserError) as error:
        FORMATS[name].read(configuration)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_key_that_nobody_knows_is_refused_unless_it_is_off(name: str) -> None:
    whole = FORMATS[name].read(THEIRS[name])
    for off in (None, False, 0, 0.0, "", [], {}):
        assert FORMATS[name].read(THEIRS[name] | {"qk_norm": off}) == whole
    for on in (True, 0.5, "rms", [0], {"eps": 0}):
        with pytest.raises(UserError, match=r"^config\.json has the key qk_norm=.* which is unknown for .*: remove it"):
            FORMATS[name].read(THEIRS[name] | {"qk_norm": on})
    with pytest.raises(UserError, match=r"^config\.json has quantization_config, .*: give the model"):
        FORMATS[name].read(THEIRS[name] | {"quantization_config": {"quant_method": "awq"}})


def test_what_acts_only_in_training_is_said() -> None:
    keys = {"attention_dropout": 0.1, "router_jitter_noise": 0.01, "auto_map": {"AutoConfig": "evil.Config"}}
    assert FORMATS["mixtral"].read(THEIRS["mixtral"] | keys) == FORMATS["mixtral"].read(THEIRS["mixtral"])
    dropout, jitter, code = notes(THEIRS["mixtral"] | keys, "MixtralForCausalLM")
    assert "attention_dropout=0.1 acts only in training" in dropout and "router_jitter_noise=0.01" in jitter
    assert "auto_map names code of the folder's own, which is not run: it is read as MixtralForCausalLM" in code
    assert notes(THEIRS["mixtral"] | {"attention_dropout": 0.0}, "MixtralForCausalLM") == []


def test_the_weight_of_the_balance_loss_is_the_same_loss() -> None:
    """Mixtral adds up the shares of a token's choices, ours averages them."""
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(50, 4)
    theirs = transformers.load_balancing_loss_func((logits,), num_experts=4, top_k=2)
    probability = logits.softmax(-1)
    assigned = torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum((0, 1)).float()
    nothing = torch.zeros(())
    statistics = RouterStatistics(probability.sum(0), assigned, nothing, nothing, nothing, torch.tensor(50.0))
    _, experts = FORMATS["mixtral"].read(THEIRS["mixtral"] | {"router_aux_loss_coef": 0.02})
    torch.testing.assert_close(experts.balance_weight * balance_loss(statistics), 0.02 * theirs)
    _, experts = FORMATS["mixtral"].read(THEIRS["mixtral"] | {"router_aux_loss_coef": 0.0})
    assert experts.balance == "none"


def test_keys_that_are_left_out_have_their_classes_defaults() -> None:
    mamba, _ = FORMATS["mamba"].read(THEIRS["mamba"])
    assert (mamba.tied_head, mamba.dt_rank, mamba.d_state, mamba.d_conv) == (True, 1, 16, 4)
    llama, _ = FORMATS["llama"].read(THEIRS["llama"])
    assert (llama.tied_head, llama.kv_heads, llama.rope_base, llama.norm_epsilon) == (False, 4, 1e4, 1e-6)
    mistral, _ = FORMATS["mistral"].read(THEIRS["mistral"])
    assert (mistral.sliding_window, mistral.rope_base, mistral.norm_epsilon) == (4096, 1e4, 1e-6)
    assert FORMATS["mistral"].read(THEIRS["mistral"] | {"sliding_window": None})[0].sliding_window is None
    for name in ("mistral", "mixtral", "jamba"):
        wide = {key: value for key, value in THEIRS[name].items() if key != "num_key_value_heads"} | {"hidden_size": 32}
        assert FORMATS[name].read(wide | {"num_attention_heads": 16})[0].kv_heads == 8
        assert FORMATS[name].read(wide | {"num_key_value_heads": None})[0].kv_heads == 4
    mixtral, experts = FORMATS["mixtral"].read(THEIRS["mixtral"])
    assert mixtral.sliding_window is None
    assert (mixtral.rope_base, experts.experts, experts.top_k, experts.capacity_factor) == (1e6, 8, 2, None)
    jamba, experts = FORMATS["jamba"].read(THEIRS["jamba"] | {"num_hidden_layers": 16})
    assert (jamba.pattern, jamba.repeat, experts.experts) == ("M-MEM-ME*-MEM-ME", 2, 16)


def test_version_4_and_5_name_the_base_of_rotary_positions_each_in_its_way() -> None:
    for keys in ({"rope_theta": 5.0}, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}):
        assert FORMATS["llama"].read(THEIRS["llama"] | keys)[0].rope_base == 5.0


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALED},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3"} | SCALED},
        {"rope_parameters": SCALED | {"rope_theta": 5e5}},
        {"rope_parameters": SCALED | {"rope_theta": 5e5}, "rope_scaling": SCALED, "rope_theta": 5e5},
    ],
    ids=["4", "4, both names of the type", "5", "both"],
)
def test_version_4_and_5_scale_rotary_positions_each_in_its_way(keys: dict) -> None:
    model, _ = FORMATS["llama"].read(THEIRS["llama"] | keys)
    scaling = (model.rope_factor, model.rope_low_freq_factor, model.rope_high_freq_factor, model.rope_original_length)
    assert (model.rope_type, model.rope_base, *scaling) == ("llama3", 5e5, 8.0, 1.0, 4.0, 8192)
    linear = {"type": "linear", "factor": 2}
    for name in ("llama", "mistral", "mixtral"):
        model, _ = FORMATS[name].read(THEIRS[name] | {"rope_scaling": linear})
        assert (model.rope_type, model.rope_factor) == ("linear", 2.0)


def test_state_spaces_pads_its_vocabulary() -> None:
    keys = {"pad_vocab_size_multiple": 16, "tie_embeddings": False, "rms_norm": False, "ssm_cfg": {"dt_rank": 7}}
    padded, _ = FORMATS["state_spaces"].read(THEIRS["state_spaces"])
    assert (padded.vocab_size, padded.tied_head, padded.norm) == (50280, True, "rmsnorm")
    model, moe = FORMATS["state_spaces"].read(THEIRS["state_spaces"] | keys | {"vocab_size": 40})
    assert (model.vocab_size, model.tied_head, model.norm, model.dt_rank) == (48, False, "layernorm", 7)
    ours = weights(model, moe)
    for entry in FORMATS["state_spaces"].entries(model, moe):
        entry.view(ours[entry.ours]).add_(1)
    assert all((tensor == 1).all() for tensor in ours.values())


@pytest.mark.parametrize("configuration", [{}, {"model_type": "mamba2"}, {"model_type": "bert", "d_model": 8}])
def test_other_formats_are_refused(configuration: dict) -> None:
    with pytest.raises(UserError, match="is not supported: give a model of one of moe_mamba, mamba"):
        detect(configuration)
