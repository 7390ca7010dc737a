"""The way in for what people have: folders that Transformers wrote, in both versions' spelling, give its logits."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.run.restore import restore
from tools.convert_from_hf import main

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "pad_token_id": None, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE: dict[str, Any] = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 16
PLACES = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("Mamba", {"state_size": 4, "time_step_rank": 3}),
    "Llama": ("Llama", HEADS),
    "Llama 3.1": ("Llama", HEADS | {"rope_parameters": ROPE | {"rope_theta": 5e5}, "tie_word_embeddings": True}),
    "Llama, biases": ("Llama", HEADS | {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "Llama, linear": ("Llama", HEADS | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "Mistral 0.1": ("Mistral", HEADS | {"sliding_window": 5}),
    "Mistral 0.3": ("Mistral", HEADS | {"sliding_window": None}),
    "Mistral Nemo": ("Mistral", HEADS | {"sliding_window": None, "head_dim": 6, "rope_parameters": ROPE}),
    "Mixtral": ("Mixtral", HEADS | EXPERTS),
    "Mixtral, window": ("Mixtral", HEADS | {"num_local_experts": 3, "sliding_window": 5, "head_dim": 6}),
    "Jamba": ("Jamba", HEADS | PLACES | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4}),
    "Jamba, head_dim": ("Jamba", HEADS | PLACES | {"num_experts": 1, "mamba_d_state": 4, "head_dim": 6}),
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))


def transformers_model(kind: str) -> Any:
    """A small random model of Transformers', nothing at its starting value."""
    torch.manual_seed(0)
    name, keys = THEIRS[kind]
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(SHAPE | keys))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", THEIRS)
def test_models_that_transformers_saved_give_its_logits(tmp_path: Path, tokens: Tensor, kind: str) -> None:
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    main(str(tmp_path / "in"), str(tmp_path / "run"), tokenizer="bytes")
    ours = restore(tmp_path / "run", CPU).model
    expected = theirs(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=0, atol=1e-5)
    states, steps = ours.initial_states(2), []
    for token in tokens.split(1, dim=1):
        out = ours(token, None, states)
        states = out.states
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)


# What Transformers 4.57 writes for such models, beside the sizes.
COMMON_4 = {
    "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 131072,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "transformers_version": "4.57.6", "use_cache": True, "vocab_size": 264,
}  # fmt: skip
LLAMA_4 = COMMON_4 | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 4, "mlp_bias": False,
    "model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
}  # fmt: skip
MISTRAL_4 = COMMON_4 | {
    "architectures": ["MistralForCausalLM"], "head_dim": None, "model_type": "mistral", "rope_theta": 10000.0,
    "sliding_window": None,
}  # fmt: skip
MIXTRAL_4 = COMMON_4 | {
    "architectures": ["MixtralForCausalLM"], "head_dim": None, "model_type": "mixtral", "num_experts_per_tok": 2,
    "num_local_experts": 4, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "sliding_window": None,
}  # fmt: skip
JAMBA_4 = COMMON_4 | PLACES | {
    "architectures": ["JambaForCausalLM"], "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 4,
    "mamba_dt_rank": 1, "mamba_expand": 2, "mamba_proj_bias": False, "model_type": "jamba", "num_experts": 4,
    "num_experts_per_tok": 2, "num_logits_to_keep": 1, "output_router_logits": False, "pad_token_id": 0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "use_mamba_kernels": True,
}  # fmt: skip
MAMBA_4 = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "dtype": "float32", "eos_token_id": 0,
    "expand": 2, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.1, "intermediate_size": 32,
    "layer_norm_epsilon": 1e-05, "model_type": "mamba", "num_hidden_layers": 2, "pad_token_id": 0,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 4, "time_step_floor": 0.0001,
    "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 3,
    "time_step_scale": 1.0, "transformers_version": "4.57.6", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "use_mambapy": False, "vocab_size": 264,
}  # fmt: skip
# state-spaces' own conversions, of Transformers 4.39, keep what they were made from.
OLDER_MAMBA = {
    "d_inner": 32, "d_model": 16, "fused_add_norm": True, "n_layer": 2, "pad_vocab_size_multiple": 8, "rms_norm": True,
    "ssm_cfg": {}, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
}  # fmt: skip
VERSION_4: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("Mamba", MAMBA_4),
    "Mamba of 4.39": ("Mamba", MAMBA_4 | OLDER_MAMBA),
    "Llama": ("Llama", LLAMA_4),
    "Llama 3.1": ("Llama 3.1", LLAMA_4 | {"rope_scaling": ROPE, "rope_theta": 5e5, "tie_word_embeddings": True}),
    "Llama, biases": ("Llama, biases", LLAMA_4 | {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "Llama, linear": ("Llama, linear", LLAMA_4 | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "Mistral 0.1": ("Mistral 0.1", MISTRAL_4 | {"sliding_window": 5}),
    "Mistral Nemo": ("Mistral Nemo", MISTRAL_4 | {"head_dim": 6, "rope_scaling": ROPE}),
    "Mixtral": ("Mixtral", MIXTRAL_4),
    "Jamba": ("Jamba", JAMBA_4),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", VERSION_4)
def test_a_config_in_version_4s_spelling_is_the_same_model(tmp_path: Path, tokens: Tensor, kind: str) -> None:
    of_5, configuration = VERSION_4[kind]
    theirs = transformers_model(of_5)
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps(configuration))
    main(str(tmp_path / "in"), str(tmp_path / "run"), tokenizer="bytes")
    expected = theirs(input_ids=tokens, use_cache=False).logits
    found = restore(tmp_path / "run", CPU).model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_bias_that_config_json_does_not_name_is_refused(tmp_path: Path) -> None:
    for kind, change, says in (
        (
            "Llama, biases",
            {"attention_bias": False},
            r"has the tensor model.layers.0.self_attn.k_proj.bias \(and 7 more",
        ),
        ("Llama, biases", {"mlp_bias": False}, r"has the tensor model.layers.0.mlp.down_proj.bias \(and 5 more"),
        ("Llama", {"mlp_bias": True}, r"has no tensor model.layers.0.mlp.gate_proj.bias, which"),
        (
            "Mistral Nemo",
            {"head_dim": 4},
            r"self_attn.q_proj.weight has shape \[24, 16\], but config.json says",
        ),
    ):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        transformers_model(kind).save_pretrained(tmp_path / "in")
        path = tmp_path / "in" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=says):
            main(str(tmp_path / "in"), str(tmp_path / "run"), tokenizer="bytes")
