"""Folders: saved, loaded, in shards, in bf16, over devices, and where this package is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.assemble import PACKAGE
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from tests.hf.conftest import DESIGNS, OWN

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
MoEMambaForCausalLM, MoEMambaConfig = modeling.MoEMambaForCausalLM, modeling.MoEMambaConfig
TOKENS = torch.arange(2, 20).view(2, 9)
DROPLESS = {"capacity_factor": None}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    "keys", [{}, {"tied_head": True}, {"norm": "layernorm", "final_norm": False, "d_inner": 11}], ids=str
)
def test_what_is_saved_is_what_is_loaded(pair: Pair, tmp_path: Path, keys: dict[str, Any]) -> None:
    _, model = pair("MEM-*E", {"router": "top_k", "top_k": 2, "balance": "bias"}, **keys)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert "model.layers.1.mixer.router.balance_bias" in index
    assert ("lm_head.weight" in index) != keys.get("tied_head", False)
    loaded, report = MoEMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert (loaded.lm_head.weight is loaded.model.embedding.weight) == keys.get("tied_head", False)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_moe_mamba.py", "modeling_moe_mamba.py"}


@pytest.mark.parametrize(("pattern", "moe"), DESIGNS.values(), ids=DESIGNS)
def test_designs_are_saved_and_loaded(pair: Pair, tmp_path: Path, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, moe)
    model.save_pretrained(tmp_path)
    loaded, report = MoEMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (
        loaded.config.to_dict()["moe"]
        == model.config.moe
        == MoEConfig(**{"experts": 4, **moe, **DROPLESS}).model_dump()
    )
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(loaded.generate(TOKENS, **GREEDY), model.generate(TOKENS, **GREEDY))


def test_experts_inside_mamba_are_counted() -> None:
    for pattern, moe, counted in (
        ("M", {"inner": OWN}, (8, 1, 0.5)),
        ("M", {"inner": OWN | {"experts": 3, "top_k": 2, "balance": "none"}}, (3, 2, 0.0)),
        ("ME", {"balance": "none", "inner": OWN | {"experts": 3, "top_k": 2, "balance": "loss"}}, (8, 1, 0.5)),
        ("ME", {"balance": "none", "inner": OWN}, (8, 1, 0.0)),
        ("(ME)", {}, (8, 1, 0.5)),
    ):
        config = MoEMambaConfig(pattern=pattern, repeat=1, moe={"experts": 8, "balance_weight": 0.5} | moe)
        assert (config.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == counted
        if counted[2]:
            config.router_aux_loss_coef = 0.25
            assert config.moe["balance_weight"] == 0.25
        else:
            with pytest.raises(ValueError, match=r"with moe\.balance=none, which has no loss"):
                config.router_aux_loss_coef = 0.25
    for pattern in ("*-", "M"):  # the second Mamba layer would have them
        assert not hasattr(MoEMambaConfig(pattern=pattern, repeat=1, moe={"inner": OWN | {"every": 2}}), "num_experts")


@pytest.mark.parametrize(
    ("pattern", "moe"), [("ME*", {"balance": "bias"}), ("(ME)*", {"balance": "bias", "inner": OWN})], ids=str
)
def test_small_and_sensitive_tensors_stay_fp32(pair: Pair, tmp_path: Path, pattern: str, moe: dict[str, Any]) -> None:
    ours, model = pair(pattern, moe, mamba_norms=True)
    model.save_pretrained(tmp_path)
    wide = {f"model.{name}" for name in ours.fp32_parameter_names()}
    expected = model.generate(TOKENS, **GREEDY)
    made = MoEMambaForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = MoEMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for some in (loaded, made) if dtype == torch.bfloat16 else (loaded,):
            assert {name for name, tensor in some.state_dict().items() if tensor.dtype == torch.float32} == wide
        torch.testing.assert_close(loaded(TOKENS).logits.float(), model(TOKENS).logits, rtol=0.1, atol=0.1)
        assert loaded.generate(TOKENS, **GREEDY).shape == expected.shape
    loaded.save_pretrained(tmp_path / "again")
    again = MoEMambaForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_cast_as_a_whole_runs(pair: Pair, dtype: torch.dtype, norm: str) -> None:
    _, model = pair("ME*-", {"router": "top_k", "top_k": 2}, norm=norm, mamba_norms=True)
    expected = model(TOKENS).logits
    model.to(dtype)
    logits = model(TOKENS).logits
    assert logits.isfinite().all()
    if dtype == torch.float64:  # a router in bf16 may choose other experts
        torch.testing.assert_close(logits.float(), expected)
    assert model.generate(TOKENS, **GREEDY).shape == (2, 13)
    model.train()(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()


@pytest.mark.parametrize("keys", [{}, {"tied_head": True}], ids=str)
@pytest.mark.parametrize("where", ["auto", "disk"])
def test_layers_go_where_a_device_map_says(pair: Pair, tmp_path: Path, where: str, keys: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    _, model = pair("MEM-*E", {"router": "top_k", "top_k": 2, "balance": "bias"}, mamba_norms=True, **keys)
    model.save_pretrained(tmp_path / "model")
    places: Any = "auto"
    if where == "disk":
        left = [
            "model.layers.0",
            "model.layers.4",
            "model.layers.5",
            "model.final_norm",
            *([] if keys else ["lm_head"]),
        ]
        layers = (f"model.layers.{place}" for place in range(6))
        names = ["model.embedding", *layers, "model.final_norm", "lm_head"]
        places = {name: "disk" if name in left else "cpu" for name in names}
    loaded = MoEMambaForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    if where == "disk":
        assert loaded.model.layers[0].mixer.conv1d.weight.device.type == "meta"
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    out = loaded(TOKENS, labels=TOKENS, output_router_logits=True)
    torch.testing.assert_close(out.loss, model(TOKENS, labels=TOKENS, output_router_logits=True).loss)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    keys = {"attention_mask": mask, **GREEDY}
    assert torch.equal(loaded.generate(TOKENS, **keys), model.generate(TOKENS, **keys))


def test_what_goes_with_the_stream_can_change_devices(pair: Pair) -> None:
    send = pytest.importorskip("accelerate.utils").send_to_device
    _, model = pair("M*")
    sequences = modeling.Sequences(1, 2, torch.zeros(1, 2, dtype=torch.bool))
    moved = send((sequences, *model(TOKENS).past_key_values.states, modeling.Sequences(1, 2)), "meta")
    assert moved[0].document_starts.device.type == moved[1].scan.device.type == moved[2].key.device.type == "meta"
    assert moved[3].document_starts is None


def test_a_configuration_goes_there_and_back(tmp_path: Path) -> None:
    moe = {"experts": 8, "router": "top_k", "top_k": 2, "capacity_factor": None}
    config = MoEMambaConfig(
        pattern="M*E", repeat=2, d_model=64, tied_head=True, moe=moe, eos_token_id=7, kv_heads=4, d_inner=85
    )
    assert config.moe == MoEConfig(**moe).model_dump()
    config.save_pretrained(tmp_path)
    loaded = MoEMambaConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict() | {"auto_map": loaded.auto_map}
    ours = ModelConfig(pattern="M*E", repeat=2, d_model=64, tied_head=True, kv_heads=4, d_inner=85)
    derived = ("layers", "resolved_d_inner", "resolved_dt_rank", "resolved_kv_heads", "resolved_d_ff")
    for name in (*ModelConfig.model_fields, *derived):
        assert getattr(loaded.stack, name) == getattr(ours, name), name
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.tie_word_embeddings) == (64, 6, True)
    assert MoEMambaConfig.from_dict({**config.to_dict(), "tie_word_embeddings": True}).tied_head


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"pattern": "MX"}, "unknown letter 'X'"),
        ({"pattern": "*", "d_model": 6, "heads": 4}, "not divisible by model.heads=4"),
        ({"moe": {"top_k": 2}}, "set moe.router=top_k"),
        ({"activation": "silu"}, "activation"),
        ({"pattern": "M(E)"}, "parentheses stand around the two or more letters"),
        ({"moe": {"inner": {"gates": 2}}}, "gates"),
        ({"moe": {"inner": {"projections": ["up"]}}}, "projections"),
        ({"moe": {"inner": {"projections": ["conv"], "router": "shared"}}}, "add out, or set moe.inner.router=own"),
        ({"moe": {"inner": {"projections": ["out"], "top_k": 99}}}, "moe.inner.top_k=99 exceeds"),
        ({"d_state": "4"}, "d_state"),
        ({"expand": 3, "d_inner": 341}, "leave one of them out"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        modeling.MoEMambaModel(MoEMambaConfig(**keys))


def test_a_new_model_starts_as_the_trainers_do() -> None:
    keys: dict[str, Any] = {"pattern": "ME*-", "repeat": 1, "d_model": 64, "vocab_size": 500, "heads": 4}
    torch.manual_seed(3)
    model = MoEMambaForCausalLM(MoEMambaConfig(**keys, moe={"experts": 4}))
    ours = LanguageModel(ModelConfig(**keys), MoEConfig(experts=4))
    initialize(ours, 0)
    for name, tensor in ours.state_dict().items():
        mine = model.state_dict()["lm_head.weight" if name == "head.weight" else f"model.{name}"]
        assert mine.mean().item() == pytest.approx(tensor.mean().item(), abs=0.35 * tensor.std().item() + 1e-6), name
        assert mine.std().item() == pytest.approx(tensor.std().item(), rel=0.25), name
    model.resize_token_embeddings(510)
    assert model(TOKENS).logits.shape == (2, 9, 510)
    assert model.config.vocab_size == 510


CLEAN = """
import json, sys, torch
assert not any(name.startswith("moe_mamba") for name in sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).moe["experts"] == 4
assert not any(name == "moe_mamba" for name in sys.modules), "the package is not found here"
tokens = torch.arange(2, 20).view(2, 9)
text = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist()
model.save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
print(json.dumps([text, model(tokens, labels=tokens).loss.item()]))
"""


@pytest.mark.slow
def test_a_folder_is_enough_where_the_package_is_not(pair: Pair, tmp_path: Path) -> None:
    _, model = pair("MEM-*E", mamba_norms=True)
    model.save_pretrained(tmp_path / "model")
    for name in ("configuration_moe_mamba.py", "modeling_moe_mamba.py"):
        assert (tmp_path / "model" / name).read_text() == (PACKAGE / "hf" / name).read_text()
    blocked = tmp_path / "blocked"  # an installed package would be found in spite of an empty PYTHONPATH
    blocked.mkdir()
    (blocked / "moe_mamba.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(blocked), "HF_MODULES_CACHE": str(tmp_path / "code")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "model"), str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Install moe_mamba" in done.stderr
    text, loss = json.loads(done.stdout.strip().splitlines()[-1])
    assert text == model.generate(TOKENS, **GREEDY).tolist()
    assert loss == pytest.approx(model(TOKENS, labels=TOKENS).loss.item(), rel=1e-5)
    assert (tmp_path / "saved" / "modeling_moe_mamba.py").is_file(), "it can be shared on"
