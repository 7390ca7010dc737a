"""The benchmark's rows ``head``: head and loss by chunks of tokens, against the logits of all tokens at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.pairs import Row, Run, pair_row, peer
from benchmarks.step import StepShapes, our_loss, our_model, training_step
from moe_mamba.kernels.cross_entropy import cross_entropy
from moe_mamba.kernels.cross_entropy.linear import linear_cross_entropy
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import keep_freed_memory

AT_ONCE = "the logits of all tokens at once"
GOAL = 0.95  # at most 5 % of the time
MiB = 2**20

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class HeadShapes:
    """What is measured: tokens whose time is taken, and those of the peak of memory, which is counted only."""

    tokens: int = 2048
    counted_tokens: int = 32_768
    vocab_size: int = 50_304
    d_model: int = 256

    @staticmethod
    def choose(tiny: bool) -> "HeadShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return HeadShapes(32, 64, 97, 8) if tiny else HeadShapes()


def head_rows(shapes: HeadShapes, step: StepShapes, repeats: int) -> list[Row]:
    """Time of head and loss, of a whole step, and the peak of memory; forward and backward, in fp32."""
    keep_freed_memory()  # as in training
    stream, weight = (torch.randn(size, shapes.d_model) for size in (shapes.tokens, shapes.vocab_size))
    targets = torch.randint(shapes.vocab_size, (shapes.tokens,))
    stream, weight = stream.requires_grad_(), (weight / shapes.d_model).requires_grad_()

    def run_of(loss: Loss) -> Run:
        return lambda: torch.autograd.grad(loss(stream, weight, targets) / shapes.tokens, (stream, weight))

    ours = run_of(linear_cross_entropy)
    name = f"head, {shapes.tokens:,} tokens x {shapes.vocab_size:,} words, d {shapes.d_model}"
    return [
        pair_row(name, AT_ONCE, ours, lambda: run_of(at_once), repeats, GOAL),
        pair_row(name, "torch's linear_cross_entropy", ours, lambda: run_of(torchs()), repeats, GOAL),
        _step_row(step, repeats),
        _memory_row(shapes),
    ]


def at_once(stream: Tensor, weight: Tensor, targets: Tensor, backend: str = "auto") -> Tensor:
    """The same loss from one tensor of logits (tokens, words)."""
    return cross_entropy(F.linear(stream, weight), targets, backend=backend).sum()


def torchs() -> Loss:
    """Torch's own loss in chunks."""
    loss = peer("torch.nn.functional", "linear_cross_entropy", "torch 2.13 or later")
    options = peer("torch.nn", "LinearCrossEntropyOptions", "torch 2.13 or later")()
    return lambda stream, weight, targets: loss(stream, weight, targets, reduction="sum", options=options)


def _step_row(shapes: StepShapes, repeats: int) -> Row:
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))
    in_chunks, whole = our_model(shapes), our_model(shapes)
    ours = training_step(in_chunks, lambda: our_loss(in_chunks, tokens))
    theirs = training_step(whole, lambda: _loss_at_once(whole, tokens))
    return pair_row(f"head in a training step, {shapes.name}", AT_ONCE, ours, lambda: theirs, repeats, GOAL)


def _loss_at_once(model: LanguageModel, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits.flatten(0, 1)
    return cross_entropy(logits, tokens.roll(-1, 1).flatten()).sum() / tokens.numel()


def _memory_row(shapes: HeadShapes) -> Row:
    """Counted by torch's tracker, on tensors that take no memory themselves."""
    ours, theirs = (_peak(loss, shapes) / MiB for loss in (linear_cross_entropy, at_once))
    name = f"head, peak memory, {shapes.counted_tokens:,} tokens x {shapes.vocab_size:,} words, d {shapes.d_model}"
    return Row(name, AT_ONCE, "MiB", ours, theirs, theirs / ours, 4.0)


def _peak(loss: Loss, shapes: HeadShapes) -> int:
    """Bytes of a forward and a backward pass, arguments included."""
    sizes = (shapes.counted_tokens, shapes.vocab_size)
    stream, weight = (torch.empty(size, shapes.d_model, device="meta", requires_grad=True) for size in sizes)
    targets = torch.empty(shapes.counted_tokens, dtype=torch.int64, device="meta")
    with MemTracker() as tracker:
        loss(stream, weight, targets, backend="torch").backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]
