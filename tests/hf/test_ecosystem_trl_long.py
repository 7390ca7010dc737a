"""TRL's trainers: each loss is the one written down by hand from logits of single texts, and steps bring it down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.hf.ecosystem import LETTERS, WORDS, alphabet, letters_tokenizer, log_probabilities, logged, settings

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
pytestmark = pytest.mark.long
PATTERNS = ["M", "ME", "MEM-*E"]
TEXTS = [alphabet(first, 3 + 2 * first % 9) for first in range(12)]


def _model(pair: Pair, pattern: str) -> Any:
    return pair(pattern, {"router": "top_k", "top_k": 2}, vocab_size=len(WORDS))[1].train()


def _close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_sft_is_the_documents_one_by_one(pair: Pair, tmp_path: Path, pattern: str) -> None:
    """TRL packs best-fit, into one row without padding: ``position_ids``, ``seq_idx`` and ``cu_seq_lens`` say where."""
    model = _model(pair, pattern)
    arguments = trl.SFTConfig(
        **settings(tmp_path, max_steps=12, learning_rate=0.02, per_device_train_batch_size=2, seed=1),
        packing=True,
        max_length=24,
    )
    assert arguments.gradient_checkpointing, "TRL's default, in this test too"
    data = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=letters_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    packing = {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert set(batch) == {"input_ids", "labels"} | packing, "what TRL packs with has changed: look at the class"
    assert batch["input_ids"].shape[0] == 1
    documents = batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())
    assert len(documents) > 3

    likelihood = torch.cat([log_probabilities(model, document) for document in documents])
    expected = -likelihood.mean() + _balance_loss(model, documents)
    _close(trainer.compute_loss(model, dict(batch)), expected)
    _close(_gradient(model, trainer.compute_loss(model, dict(batch))), _gradient(model, expected))

    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert ("aux_loss" in trainer.state.log_history[0]) == ("E" in pattern), "experts are balanced unless told not to"


def _balance_loss(model: Any, documents: tuple[Tensor, ...]) -> Tensor | float:
    """Switch Transformer's loss, eq. 4, as Mixtral's users have it: over all routers' tokens together, times top_k."""
    if "E" not in model.config.layers:
        return 0.0
    logits = [model(one[None], use_cache=False, output_router_logits=True).router_logits for one in documents]
    share = torch.cat([router for routers in logits for router in routers]).softmax(-1)  # (tokens, experts)
    chosen = torch.zeros_like(share).scatter(1, share.topk(model.config.num_experts_per_tok).indices, 1.0)
    return model.config.router_aux_loss_coef * model.config.num_experts * (chosen.mean(0) * share.mean(0)).sum()


def _gradient(model: Any, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_packed_sft_in_bf16_learns(pair: Pair, tmp_path: Path) -> None:
    model = _model(pair, "ME*-")
    keys = settings(tmp_path, max_steps=12, learning_rate=0.02, per_device_train_batch_size=2, seed=1) | {"bf16": True}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**keys, packing=True, max_length=24),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=letters_tokenizer(),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dpo_is_the_loss_of_the_texts_one_by_one(pair: Pair, tmp_path: Path, pattern: str) -> None:
    model, reference = _model(pair, pattern), _model(pair, pattern)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rows = [
        {"prompt": alphabet(n, 2 + n % 3), "chosen": " " + alphabet(n + 9, 3), "rejected": " " + alphabet(n, 5 + n)}
        for n in range(4)
    ]
    arguments = trl.DPOConfig(
        **settings(tmp_path, max_steps=10, learning_rate=0.01, per_device_train_batch_size=4),
        beta=0.3,
        router_aux_loss_coef=0.0,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=letters_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any(), "texts of several lengths in one batch"

    def of_completions(one: Any) -> tuple[Tensor, Tensor]:
        """Summed log probabilities of the chosen completions, and of the rejected ones."""
        sums = [
            log_probabilities(one, tokens[mask.bool()])[completion[mask.bool()][1:].bool()].sum()
            for tokens, mask, completion in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        return torch.stack(sums[: len(sums) // 2]), torch.stack(sums[len(sums) // 2 :])

    (chosen, rejected), (was_chosen, was_rejected) = of_completions(model), of_completions(reference)
    expected = -logsigmoid(0.3 * ((chosen - was_chosen) - (rejected - was_rejected))).mean()
    _close(trainer.compute_loss(model, dict(batch)), expected)
    metrics = trainer._metrics["train"]
    _close(metrics["logps/chosen"][-1], chosen.mean().item())
    _close(metrics["logps/rejected"][-1], rejected.mean().item())
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.2
    margins = logged(trainer, "rewards/margins")
    assert margins[-1] > margins[0] + 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_grpo_scores_what_it_generated(pair: Pair, tmp_path: Path, pattern: str) -> None:
    """Prompts padded on the left, completions on the right: log probabilities are those of each text by itself."""
    model = _model(pair, pattern)
    tokenizer = letters_tokenizer()

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        """The share of early letters."""
        return [sum(word in LETTERS[:8] for word in text.split()) / 6 for text in completions]

    arguments = trl.GRPOConfig(
        **settings(tmp_path, max_steps=12, learning_rate=0.02, per_device_train_batch_size=8, seed=0),
        num_generations=4,
        max_completion_length=6,
        router_aux_loss_coef=0.0,
    )
    prompts = [alphabet(n, 2 + n) for n in range(8)]  # no two of one length
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert (batch["prompt_mask"] == 0).any(), "prompts of several lengths in one batch"
    tokens = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    kept = batch["completion_ids"].shape[1]
    got, _, _ = trainer._get_per_token_logps_and_entropies(model, tokens, mask, kept)
    for row, visible, values, completion in zip(tokens, mask.bool(), got, batch["completion_mask"].bool(), strict=True):
        alone = log_probabilities(model, row[visible])
        _close(values[completion], alone[len(alone) - int(completion.sum()) :])
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reward_trainer_scores_each_texts_last_token(pair: Pair, tmp_path: Path, pattern: str) -> None:
    causal = _model(pair, pattern)
    config = causal.config
    config.num_labels = 1
    torch.manual_seed(0)
    model = modeling.MoEMambaForSequenceClassification(config)
    model.model.load_state_dict(causal.model.state_dict())
    rows = [{"chosen": alphabet(n, 3 + n % 4), "rejected": alphabet(25 - n, 2 + n % 5)} for n in range(8)]
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**settings(tmp_path, max_steps=12, learning_rate=0.01, per_device_train_batch_size=8)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=letters_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any()
    alone = [
        model.score(model.model(tokens[mask.bool()][None], use_cache=False).last_hidden_state[0, -1])
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    chosen, rejected = torch.cat(alone).chunk(2)
    _close(trainer.compute_loss(model, dict(batch)), -logsigmoid(chosen - rejected).mean())
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.2
    assert logged(trainer, "accuracy")[-1] == 1.0


@pytest.mark.parametrize("kind", ["bytes", "BOS"])
def test_an_exported_model_learns_to_stop(tmp_path: Path, kind: str) -> None:
    """With TRL's defaults, which end each text with the name of EOS."""
    from transformers import AutoTokenizer

    from moe_mamba.data.tokenizer import BytesTokenizer
    from tests.data.tokenizer_kinds import llama, named
    from tests.hf.fine_tuning import TEXTS, exported, written

    folder = exported(tmp_path, BytesTokenizer() if kind == "bytes" else named(llama(beginning=True)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = modeling.MoEMambaForCausalLM.from_pretrained(folder).train()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **settings(tmp_path, max_steps=120, learning_rate=0.02, per_device_train_batch_size=6, seed=0)
        ),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    for text in TEXTS:
        found, stopped = written(model, tokenizer, text[:5])
        assert stopped and found in TEXTS, (found, text)
