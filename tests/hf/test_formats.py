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
from moe_mamba.model.language_model import LanguageModel

SIZES = {"repeat": 1, "d_model": 16, "vocab_size": 32, "d_state": 4, "heads": 4, "d_ff": 24}
SWIGLU: dict[str, Any] = {"kv_heads": 2, "activation": "swiglu"}
JAMBA: dict[str, Any] = SWIGLU | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
TOP_2: dict[str, Any] = {"router": "top_k", "top_k": 2}
MIXTRAL = TOP_2 | {"renormalize": True}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("moe_mamba", {"pattern": "MEM-*E", "norm": "layernorm"}, {"shared_experts": 1, "balance": "bias"}),
    ("moe_mamba", {"pattern": "M", "tied_head": True, "final_norm": False, "selective": False}, {}),
    ("mamba", {"pattern": "M", "repeat": 3, "d_conv": 3, "expand": 3, "dt_rank": 5}, {}),
    ("mamba", {"pattern": "M", "repeat": 2, "tied_head": True}, {}),
    ("llama", {"pattern": "*-", "repeat": 2, "rope_base": 100.0, **SWIGLU}, {}),
    ("mixtral", {"pattern": "*E", "repeat": 2, **SWIGLU}, MIXTRAL),
    ("jamba", {"pattern": "M-ME*-ME", **JAMBA}, TOP_2),
    ("jamba", {"pattern": "*EM-", "repeat": 2, **JAMBA}, {}),
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
    for key in ("d_model", "vocab_size", "norm_epsilon", "tied_head", "activation"):
        if key != "activation" or "-" in model.layers or "E" in model.layers:
            assert getattr(found_model, key) == getattr(model, key), key
    assert {name: tensor.shape for name, tensor in weights(found_model, found_experts).items()} == {
        name: tensor.shape for name, tensor in weights(model, experts).items()
    }
    if "E" in model.layers:
        assert (found_experts.top_k, found_experts.renormalize) == (experts.top_k, experts.renormalize)


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
        ("mamba", {"pattern": "ME"}, {}, "layer 1 is mixture of experts (E), which MambaForCausalLM has not"),
        ("mamba", {"pattern": "M", "mamba_norms": True}, {}, "mamba_norms=true"),
        ("mamba", {"pattern": "M", "norm": "layernorm"}, {}, "norm=layernorm"),
        ("mamba", {"pattern": "M", "final_norm": False}, {}, "final_norm=false"),
        ("mamba", {"pattern": "M", "selective": False}, {}, "selective=false"),
        ("llama", {"pattern": "*-*M", **SWIGLU}, {}, "layer 3 is Mamba (M), which LlamaForCausalLM has not"),
        ("llama", {"pattern": "*--*", **SWIGLU}, {}, "layer 2 is feed-forward (-): LlamaForCausalLM has * and -"),
        ("llama", {"pattern": "*-*", **SWIGLU}, {}, "layer 2 is attention (*), the last"),
        ("llama", {"pattern": "*-", "activation": "relu"}, {}, "activation=relu"),
        ("llama", {"pattern": "*-", **SWIGLU, "positions": "none"}, {}, "positions=none"),
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
THEIRS["mixtral"] = THEIRS["llama"] | {"model_type": "mixtral"}
THEIRS["jamba"] = THEIRS["llama"] | {"model_type": "jamba", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mamba", {"use_bias": True}, "use_bias=True"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("mamba", {"intermediate_size": 48}, "intermediate_size=48"),
        ("mamba", {"hidden_size": None}, "hidden_size is missing"),
        ("mamba", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ("mamba", {"time_step_rank": "some"}, "time_step_rank='some'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"head_dim": 8}, "head_dim=8"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": 3}, "rope_parameters is 3, and an object belongs there"),
        ("llama", {"rope_scaling": ["linear"]}, "rope_scaling is ['linear']"),
        ("llama", {"hidden_size": 18}, "not divisible by model.heads=4"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms=False"),
        ("moe_mamba", {"moe": 3}, "moe is 3"),
        ("state_spaces", {"ssm_cfg": []}, "ssm_cfg is []"),
        ("state_spaces", {"ssm_cfg": {"layer": "Mamba2"}}, "layer='Mamba2'"),
        ("state_spaces", {"attn_layer_idx": [1]}, "attn_layer_idx=[1]"),
        ("state_spaces", {"d_intermediate": 64}, "d_intermediate=64"),
    ],
)
def test_what_ours_cannot_hold_is_refused(name: str, keys: dict, says: str) -> None:
    configuration = {"hidden_act": "silu"} | THEIRS[name] | keys if name != "state_spaces" else THEIRS[name] | keys
    with pytest.raises(UserError) as error:
        FORMATS[name].read(configuration)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_keys_that_are_left_out_have_their_classes_defaults() -> None:
    mamba, _ = FORMATS["mamba"].read(THEIRS["mamba"])
    assert (mamba.tied_head, mamba.dt_rank, mamba.d_state, mamba.d_conv) == (True, 1, 16, 4)
    llama, _ = FORMATS["llama"].read(THEIRS["llama"])
    assert (llama.tied_head, llama.kv_heads, llama.rope_base, llama.norm_epsilon) == (False, 4, 1e4, 1e-6)
    mixtral, experts = FORMATS["mixtral"].read(THEIRS["mixtral"])
    assert (mixtral.rope_base, experts.experts, experts.top_k, experts.capacity_factor) == (1e6, 8, 2, None)
    jamba, experts = FORMATS["jamba"].read(THEIRS["jamba"] | {"num_hidden_layers": 16})
    assert (jamba.pattern, jamba.repeat, experts.experts) == ("M-MEM-ME*-MEM-ME", 2, 16)


def test_version_4_and_5_name_the_base_of_rotary_positions_each_in_its_way() -> None:
    for keys in ({"rope_theta": 5.0}, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}):
        assert FORMATS["llama"].read(THEIRS["llama"] | keys)[0].rope_base == 5.0


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
    with pytest.raises(UserError, match="is none that is read: give a model of moe_mamba, mamba"):
        detect(configuration)
