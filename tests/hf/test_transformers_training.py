"""Fine-tuning with Transformers' Trainer, gradient checkpointing, and the pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.conftest import DESIGNS

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")
MoEMambaForCausalLM, MoEMambaConfig = modeling.MoEMambaForCausalLM, modeling.MoEMambaConfig

Pair = Callable[..., Any]
TOKENS = torch.arange(2, 26).view(3, 8)


def _layers_run(model: Any, action: Callable[[], Any]) -> int:
    """How many layers run while something is done, those that are run again included."""
    runs: list[Any] = []
    handles = [layer.mixer.register_forward_pre_hook(lambda *args: runs.append(args)) for layer in model.model.layers]
    action()
    for handle in handles:
        handle.remove()
    return len(runs)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by its older name, too
@pytest.mark.parametrize(
    ("pattern", "moe"), [("MEM-*E", {}), ("(ME)(*E)M-ME", DESIGNS["shared, top 2"][1])], ids=["plain", "designs"]
)
def test_gradient_checkpointing_gives_the_same_gradients(pair: Pair, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, {"capacity_factor": 1.0} | moe)
    model.train()
    expected = _gradients(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    got = _gradients(model)
    assert _layers_run(model, lambda: _gradients(model)) == 12
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    cache = modeling.MoEMambaCache()
    assert getattr(model(TOKENS, use_cache=True), modeling.CACHE) is None
    assert getattr(model(TOKENS, cache=cache), modeling.CACHE) is None
    assert cache.is_empty
    assert model.eval()(TOKENS, cache=cache)[modeling.CACHE] is cache
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        model.train()(TOKENS, cache=cache)
    model.train().gradient_checkpointing_disable()
    assert _layers_run(model, lambda: _gradients(model)) == 6
    model.activation_checkpointing_enable(every_n_layers=2)
    assert _layers_run(model, lambda: _gradients(model)) == 9
    with pytest.raises(ValueError, match="leave out offload"):
        model.activation_checkpointing_enable(offload=True)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_trainer_takes_steps_and_the_loss_falls(pair: Pair, tmp_path: Path, keys: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    _, model = pair("ME*", {"router": "top_k", "top_k": 2}, tied_head=True)
    model.config.output_router_logits = True
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        learning_rate=0.03,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=8,
        disable_tqdm=True,
        **keys,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data)
    before = model(TOKENS, labels=TOKENS, output_router_logits=True).loss.item()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(before, rel=0.02), "micro-steps add up to the batch's loss"
    assert losses[-1] < losses[0] - 0.5
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < losses[0] - 0.5
    loaded = MoEMambaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-8").eval()
    tolerance = 0.05 if "bf16" in keys else 1e-5  # the Trainer's model stays in its autocast
    torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits, rtol=tolerance, atol=tolerance)


def test_a_new_model_learns() -> None:
    torch.manual_seed(0)
    config = MoEMambaConfig(pattern="ME", repeat=1, d_model=16, vocab_size=31, d_ff=24, moe={"experts": 4})
    model = MoEMambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(31.0).log().item(), abs=0.3)
    assert losses[-1] < 1.0


def test_the_pipeline_generates_text(pair: Pair) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "<pad>", *(chr(ord("a") + place) for place in range(26))]
    built = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )
    _, model = pair("MEM-*E", vocab_size=len(words))
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["a b c d", "q"]
    keys = {"max_new_tokens": 5, "do_sample": False}
    alone = [write(prompt, **keys)[0]["generated_text"] for prompt in prompts]
    together = [texts[0]["generated_text"] for texts in write(prompts, batch_size=2, **keys)]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    assert len(alone[0]) > len(prompts[0])
