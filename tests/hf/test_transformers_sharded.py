"""Transformers' tensor parallelism shards what ``base_model_tp_plan`` names, and computes the same function."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from moe_mamba.hf.configuration_moe_mamba import SHARDS_TENSORS
from tests import ROOT
from tests.hf.conftest import SHARED, make_pair

if not SHARDS_TENSORS:
    pytest.skip("this Transformers has no plan of ours", allow_module_level=True)

SWIGLU: dict[str, Any] = {"activation": "swiglu"}
RELU: dict[str, Any] = {"activation": "relu"}
BIASES: dict[str, Any] = {"mlp_bias": True, "attention_bias": True}
TOP_2 = {"router": "top_k", "top_k": 2, "shared_experts": 1}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("*-", {}, SWIGLU),
    "biases": ("*-", {}, RELU | BIASES | {"tied_head": True}),
    "gated-biases": ("*-", {}, SWIGLU | BIASES),
    "experts": ("*E", TOP_2, SWIGLU | {"kv_heads": 2, "sliding_window": 4}),
    "all": ("*E-", TOP_2, RELU | {"tied_head": True}),
    "hybrid": ("ME*-", {"capacity_factor": 1.0}, SWIGLU),
    "expert-choice": ("ME", {"router": "expert_choice", "capacity_factor": 1.0}, {}),
    "parallel": ("(*E)-", TOP_2, SWIGLU),
    "inner": ("(ME)*", {"inner": SHARED | {"expert": "switch", "d_expert": 8}}, {}),
}
"""Name -> pattern, routing, other keys."""
SHARDED = {
    "attention": "q_proj k_proj v_proj o_proj in_proj out_proj",
    "biases": "q_proj k_proj v_proj o_proj in_proj out_proj",
    "gated-biases": "q_proj k_proj v_proj o_proj",
    "experts": "q_proj k_proj v_proj o_proj experts.in_proj experts.out_proj experts shared.in_proj shared.out_proj",
    "all": "q_proj k_proj v_proj o_proj in_proj out_proj experts.in_proj experts.out_proj experts shared.in_proj "
    "shared.out_proj",
    "hybrid": "q_proj k_proj v_proj o_proj experts.in_proj experts.out_proj experts",
    "expert-choice": "experts.in_proj experts.out_proj experts",
    "parallel": "in_proj out_proj *.q_proj *.k_proj *.v_proj *.o_proj *.experts.in_proj *.experts.out_proj *.experts "
    "*.shared.in_proj *.shared.out_proj",
    "inner": "q_proj k_proj v_proj o_proj *.experts.in_proj *.experts.out_proj *.experts",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_names_what_the_model_has(name: str) -> None:
    pattern, moe, keys = MODELS[name]
    _, model = make_pair(pattern, moe, **keys)
    plan = model.config.base_model_tp_plan
    assert plan.keys() == {"embedding", *(f"layers.*.mixer.{part}" for part in SHARDED[name].split())}
    assert model.tp_plan == {"lm_head": "colwise_gather_output"} | {f"model.{key}": how for key, how in plan.items()}
    owned = {name for name, _ in (*model.model.named_modules(), *model.model.named_parameters())}
    assert plan.keys() <= {re.sub(r"\d+", "*", one) for one in owned}
    assert "base_model_tp_plan" not in model.config.to_dict()


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    for name, (pattern, moe, keys) in MODELS.items():
        make_pair(pattern, moe, **keys)[1].save_pretrained(tmp_path / name)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.hf.sharded_script", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line in MODELS] == sorted([*MODELS] * 2)
