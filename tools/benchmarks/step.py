"""The benchmark's rows ``step`` and its ``profile``: training steps of whole models on a CPU, in fp32 and bf16."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pairs import Elsewhere, Row, Run, pair_row, peer
from benchmarks.profiling import Profile, profile
from benchmarks.scaling import Processes, ScalingShapes, start_server
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels.products import multiplies_bf16
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import keep_freed_memory

PROFILED_STEPS = 3


@dataclass(frozen=True)
class StepShapes:
    """What is measured."""

    batch: int = 8
    length: int = 256
    d_model: int = 256
    d_expert: int = 512
    vocab_size: int = 512
    pairs: int = 4  # of Mamba and experts

    @staticmethod
    def choose(tiny: bool) -> "StepShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return StepShapes(2, 16, 32, 32, 32, 1) if tiny else StepShapes()

    @property
    def name(self) -> str:
        """Of the step."""
        return f"ME x {self.pairs}, d {self.d_model}, {self.batch} x {self.length} tokens"


def step_row(shapes: StepShapes, repeats: int) -> Row:
    """Forward, backward and AdamW of a whole model, in fp32, against JambaForCausalLM of the same shapes.

    Each in a process of its own, with its own allocator: ours keeps freed memory, as in training.
    """
    keep_freed_memory()
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))
    ours = our_model(shapes)
    our_step = training_step(ours, lambda: our_loss(ours, tokens))
    theirs = partial(Elsewhere, partial(jamba_step, shapes, sum(parameter.numel() for parameter in ours.parameters())))
    return pair_row(f"training step, {shapes.name}", "Transformers' Jamba", our_step, theirs, repeats, 40.0)


def bf16_row(tiny: bool, repeats: int) -> Row:
    """A step of the engine in bf16 against fp32, in a process each: forward, backward, AdamW on fp32 masters."""
    wide = ScalingShapes.choose(True) if tiny else ScalingShapes(tokens=2048, d_model=512, layouts=("data",))
    name = f"training step in bf16, ME x {wide.pairs}, d {wide.d_model}, {wide.tokens:,} tokens"
    start_server(wide)
    with Processes(1, "data", replace(wide, precision="bf16")) as ours, Processes(1, "data", wide) as theirs:
        return pair_row(name, "fp32", ours.step, lambda: theirs.step, repeats, bf16_goal(1.7))


def bf16_goal(goal: float) -> float:
    """How many times as fast as fp32: ``goal`` where the processor multiplies bf16 faster, else 1."""
    return goal if multiplies_bf16() else 1.0


def jamba_step(shapes: StepShapes, parameters: int) -> Run:
    """A step of Transformers' model, which must have as many parameters."""
    theirs = jamba(shapes)
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters, "the models differ"

    def loss() -> Tensor:
        logits = theirs(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())

    return training_step(theirs, loss)


def step_profile(shapes: StepShapes) -> Profile:
    """Where the time of our training step goes, by operation."""
    keep_freed_memory()  # as in training
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))
    model = our_model(shapes)
    step = training_step(model, lambda: our_loss(model, tokens))
    return profile(f"training step, {shapes.name}", model, step, PROFILED_STEPS)


def our_loss(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens, as training computes it."""
    return model(tokens, targets=tokens.roll(-1, 1)).cross_entropy / tokens.numel()


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """What one step of training does, the same for both."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_model(shapes: StepShapes) -> LanguageModel:
    """``ME`` with Jamba's norms and SwiGLU experts, top-1, dropless."""
    config = ModelConfig(
        pattern="ME",
        repeat=shapes.pairs,
        d_model=shapes.d_model,
        vocab_size=shapes.vocab_size,
        mamba_norms=True,
        activation="swiglu",
        d_ff=shapes.d_expert,
    )
    model = LanguageModel(config, MoEConfig(experts=8, router="top_k", capacity_factor=None, balance="none"))
    initialize(model, seed=0)
    return model


def jamba(shapes: StepShapes) -> Any:
    """The same in Transformers, without attention layers."""
    configuration, model = (peer("transformers", name, "transformers", "benchmark") for name in JAMBA)
    return model(
        configuration(
            num_hidden_layers=shapes.pairs,
            attn_layer_period=shapes.pairs + 1,
            attn_layer_offset=shapes.pairs,
            expert_layer_period=1,
            expert_layer_offset=0,
            hidden_size=shapes.d_model,
            intermediate_size=shapes.d_expert,
            vocab_size=shapes.vocab_size,
            num_experts=8,
            num_experts_per_tok=1,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=-(-shapes.d_model // 16),
            num_attention_heads=1,
            num_key_value_heads=1,
            use_mamba_kernels=False,
            tie_word_embeddings=False,
            pad_token_id=None,
        )
    )


JAMBA = ("JambaConfig", "JambaForCausalLM")
