"""The model without a head, the classifier, and what loads them; the weights that a resize leaves alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_mamba.hf.formats.own import CLASSES

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
TOKENS = torch.arange(2, 20).view(2, 9)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_without_a_head(pair: Pair, tmp_path: Path, tied: bool) -> None:
    _, model = pair("ME*", tied_head=tied)
    read = model.base_model(TOKENS, output_hidden_states=True)
    assert model.base_model is model.model
    _close(model.lm_head(read.last_hidden_state), model(TOKENS).logits)
    assert read.hidden_states[-1] is read.last_hidden_state
    model.save_pretrained(tmp_path)
    for load in (modeling.MoEMambaModel.from_pretrained, _auto("AutoModel")):
        base, report = load(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        _close(base.eval()(TOKENS).last_hidden_state, read.last_hidden_state)


def _auto(name: str) -> Callable[..., Any]:
    """Load as from a folder that was exported, whose config.json names all classes."""

    def load(folder: Path, **keys: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] |= {auto: f"modeling_moe_mamba.{kind}" for auto, kind in CLASSES.items()}
        (folder / "config.json").write_text(json.dumps(config))
        return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, **keys)

    return load


def test_the_head_of_an_older_folder_is_found(pair: Pair, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, model = pair("ME")
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    weights = load_file(path)
    weights["model.head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, path, {"format": "pt"})
    loaded = modeling.MoEMambaForCausalLM.from_pretrained(tmp_path / "old").eval()
    _close(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "new")
    again, report = modeling.MoEMambaForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values())
    _close(again.eval()(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(("labels", "kind"), [(1, "regression"), (3, "single"), (3, "multi")])
def test_a_text_is_scored_by_its_last_token(pair: Pair, tmp_path: Path, labels: int, kind: str) -> None:
    _, model = pair("ME*")
    model.save_pretrained(tmp_path)
    scorer = _auto("AutoModelForSequenceClassification")(tmp_path, num_labels=labels).eval()
    torch.nn.init.normal_(scorer.score.weight)
    mask = torch.tensor([[1] * 9, [0, 1, 1, 1, 1, 1, 0, 0, 0]])
    target = {"regression": torch.rand(2), "single": torch.tensor([2, 0]), "multi": torch.rand(2, 3)}[kind]
    out = scorer(TOKENS, mask, labels=target)
    for row, visible in enumerate(mask.bool()):
        _close(out.logits[row], scorer(TOKENS[row : row + 1, visible]).logits[0])
        stream = scorer.model(TOKENS[row : row + 1, visible]).last_hidden_state
        _close(out.logits[row], scorer.score(stream[0, -1]))
    functional = torch.nn.functional
    expected = {
        "regression": lambda: functional.mse_loss(out.logits[:, 0], target),
        "single": lambda: functional.cross_entropy(out.logits, target),
        "multi": lambda: functional.binary_cross_entropy_with_logits(out.logits, target),
    }[kind]()
    _close(out.loss, expected)
    padded = torch.where(mask == 1, TOKENS, 1)  # config.pad_token_id, on the right of the second row's text
    padded[1, 0] = 5
    mask[1, 0] = 1
    _close(scorer(padded).logits, scorer(padded, mask).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_post_init_after_a_resize_leaves_weights_alone(pair: Pair, tied: bool) -> None:
    _, model = pair("ME", tied_head=tied)
    model.resize_token_embeddings(40)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.post_init()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(TOKENS).logits.shape == (2, 9, 40)


def test_a_missing_weight_is_filled_and_the_others_are_kept(pair: Pair, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, model = pair("ME")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mixer.x_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = modeling.MoEMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.layers.0.mixer.x_proj.weight"}
    states = loaded.state_dict()
    assert all(torch.equal(states[name], tensor) for name, tensor in weights.items())
    made = states["model.layers.0.mixer.x_proj.weight"]
    assert made.isfinite().all() and 0 < made.abs().max() <= made.shape[1] ** -0.5
