"""What parts of a model keep and take that are no mixer's: norms, the residual stream, embedding, and the head.

Sizes are a rank's (``work.Share``). Tensor-parallel ranks share the stream's tokens between mixers; see
``parallel/tensor.py`` for what is gathered where.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.model.tape import Peak, Recorded, Tape
from moe_mamba.model.work import FP32, INT64, Share

if TYPE_CHECKING:
    from moe_mamba.model.mixers.base import Mixer

    Mixers = tuple[type[Mixer], ...]


def record_norm(
    tape: Tape, x: Recorded, update: Recorded | None, rows: int, d: int, kind: str = "rmsnorm"
) -> tuple[Recorded, Recorded]:
    """A norm of ``x`` + ``update``, (rows, d); returns the normalised sum and the sum. It keeps the sum."""
    if kind == "rmsnorm":
        y, scale = tape.tensor(rows * d), tape.tensor(rows, FP32)
        reads = (x,) if update is None else (x, update)
        total = x if update is None else tape.tensor(rows * d)
        tape.do(reads, (y,) if update is None else (y, total), (total, scale), weights=d * FP32, gradient="joint")
        return y, total
    total = x if update is None else tape.add(x, update)
    wide = total if tape.width >= FP32 else tape.one(total, numbers=rows * d, width=FP32)
    statistics = tape.tensor(2 * rows, FP32)
    made = tape.one(wide, numbers=rows * d, width=max(FP32, tape.width), keeps=(wide, statistics), weights=2 * d * FP32)
    return made if tape.width >= FP32 else tape.one(made, numbers=rows * d), total


def enter(tape: Tape, x: Recorded, share: Share, d_model: int, joins: bool) -> Recorded:
    """The tokens of all tensor-parallel ranks, unless the layer has gathered them for several mixers."""
    return x if joins or share.tensor == 1 else tape.one(x, numbers=share.tokens * d_model)


def leave(tape: Tape, y: Recorded, share: Share, d_model: int, joins: bool) -> Recorded:
    """This rank's tokens of partial sums, unless the layer sums those of several mixers."""
    return y if joins or share.tensor == 1 else tape.one(y, numbers=share.tokens // share.tensor * d_model)


def record_activation(tape: Tape, x: Recorded, rows: int, width: int, kind: str) -> Recorded:
    """An activation to (rows, width): Triton's keeps its input, torch's what its own operations keep."""
    if tape.fused or kind == "gelu":
        return tape.one(x, numbers=rows * width, keeps=(x,))
    if kind == "swiglu":
        gate, up = tape.split(x, rows * width, rows * width)
        gated = tape.one(gate, numbers=rows * width, keeps=(gate,))
        return tape.one(gated, up, numbers=rows * width, keeps=(gated, up))
    made = tape.tensor(rows * width)
    tape.do((x,), (made,), (made,))
    if kind == "relu":
        return made
    return tape.one(made, numbers=rows * width, keeps=(made,), backward=2 * made.bytes)


def record_routing(tape: Tape, moe: MoEConfig, x: Recorded, tokens: int, rows: int) -> Recorded:
    """A router's scores in fp32, its choice and its statistics; returns the weights of the rows, with their order."""
    wide = x if tape.width >= FP32 else tape.one(x, numbers=tokens * (x.bytes // tokens // tape.width), width=FP32)
    size, scores = tokens * moe.experts, tape.tensor(tokens * moe.experts, FP32)
    logits = tape.tensor(size, FP32)
    tape.do((wide,), (logits,), (wide,), weights=x.bytes // tokens // tape.width * moe.experts * FP32)
    tape.do((logits,), (scores,), (scores,))
    tape.do((logits,), (), (logits, tape.tensor(2 * tokens, FP32)), forward=size * FP32, backward=size * FP32)  # z-loss
    chosen = tokens * (moe.top_k if moe.router != "expert_choice" else moe.experts)
    order = tape.tensor(rows + 3 * chosen, INT64)
    weight = tape.tensor(rows, FP32)
    tape.do((scores,), (weight,), (order, weight), backward=size * FP32)
    return weight


def record_gather(tape: Tape, x: Recorded, rows: int, d: int) -> Recorded:
    """Tokens in the order of their experts."""
    return tape.one(x, numbers=rows * d)


def record_travel(tape: Tape, x: Recorded, rows: int, d: int, ranks: int, before: int = 0) -> Recorded:
    """Rows on their way to their experts, or back, where they are put in order before and after."""
    if ranks == 1:
        return x
    first = tape.one(x, numbers=(before or rows) * d)
    return tape.one(first, numbers=rows * d)


def record_combination(
    tape: Tape, rows: Recorded, weight: Recorded, tokens: int, d: int, held: Iterable[Recorded] = ()
) -> Recorded:
    """The weighted sum of each token's rows; ``held``: what of them, as they were before, is still there."""
    made = tape.tensor(tokens * d)
    tape.do((rows, weight), (made,), (rows, weight), held=held)
    return made


def layer_peak(
    mixers: "Mixers", config: ModelConfig, moe: MoEConfig, shares: Sequence[Share], tape: Tape, merged: bool
) -> Peak:
    """What a layer keeps and takes.

    Args:
        mixers: of the layer.
        config: of the model.
        moe: of its experts.
        shares: sizes for each mixer, which differ in the rows that its routers send.
        tape: an empty one.
        merged: whether the layer gets the stream with its update added: the first one does, and with recomputation all.
    """
    tokens = shares[0].tokens // shares[0].tensor
    stream = tape.tensor(tokens * config.d_model)
    update = None if merged else tape.tensor(tokens * config.d_model)
    normalised, total = record_norm(tape, stream, update, tokens, config.d_model, config.norm)
    made = _record_mixers(mixers, config, moe, shares, tape, normalised)
    return tape.peak((total, made), (stream,) if update is None else (stream, update))


def _record_mixers(
    mixers: "Mixers", config: ModelConfig, moe: MoEConfig, shares: Sequence[Share], tape: Tape, x: Recorded
) -> Recorded:
    """The mixers of a layer on one input, as ``layer.ParallelMixers`` runs them: those whose rows travel end last."""
    share = shares[0]
    if len(mixers) == 1:
        return mixers[0].record(config, moe, share, tape, x, False)
    joins = {mixer: mixer.gathers_tokens or (mixer.routes and share.expert_tensor) for mixer in mixers}
    whole = enter(tape, x, share, config.d_model, not any(joins.values()))
    together: list[Recorded] = []
    apart: list[Recorded] = []
    for mixer, own in sorted(zip(mixers, shares, strict=True), key=lambda one: one[0].begins):
        is_joined = joins[mixer] and share.tensor > 1
        y = mixer.record(config, moe, own, tape, whole if joins[mixer] else x, is_joined)
        (together if joins[mixer] else apart).append(y)
    if together:
        apart.append(leave(tape, tape.add(*together), share, config.d_model, False))
    return tape.add(*apart)


def head_peak(config: ModelConfig, share: Share, tape: Tape, rows: int) -> Peak:
    """What the last norm and the head with its loss keep and take.

    The loss is made by chunks of tokens, with the gradients of stream and weight at once: these are kept.

    Args:
        config: of the model.
        share: sizes.
        tape: an empty one.
        rows: of the vocabulary on this rank.
    """
    tokens, d = share.tokens // share.tensor, config.d_model
    stream = tape.tensor(tokens * d)
    total = tape.one(stream, numbers=tokens * d)  # the last update is added
    y = record_norm(tape, total, None, tokens, d, config.norm)[0] if config.final_norm else total
    mine = y.bytes if share.tensor > 1 else 0  # is there while all tokens' are
    y = enter(tape, y, share, d, False)
    where, is_whole = "cpu" if tape.on_cpu else "cuda", share.tensor == 1
    most = linear.chunk_bytes(where, rows * d * tape.width, is_whole)
    chunks = max(1, -(-share.tokens * rows * tape.width // most))
    chunk = linear.held_chunks(where, is_whole) * -(-share.tokens // chunks) * rows * tape.width
    weight_width = tape.width if chunks == 1 else max(FP32, tape.width)
    gradients = tape.tensor(share.tokens * d), tape.tensor(rows * d, weight_width)
    loss = tape.tensor(1, FP32)
    master = FP32 if tape.is_sharded else tape.width
    cast = rows * d * master if weight_width != master else 0
    product = rows * d * tape.width if chunks > 1 and tape.width < FP32 else 0
    tape.do(
        (y,),
        (loss,),
        gradients,
        weights=cast,
        forward=mine + tape.cast_bytes(rows * d) + chunk + min(product, linear.CHUNK) + 6 * share.tokens * FP32,
        gradient="kept",
    )
    return tape.peak((loss,), (stream,))


def embedding_bytes(share: Share) -> int:
    """Indices, which the backward pass keeps; with tensor-parallel ranks also a mask."""
    return share.tokens * INT64 * (1 if share.tensor == 1 else 2)
