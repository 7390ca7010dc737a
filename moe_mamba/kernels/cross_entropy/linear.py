"""Cross entropy of a linear head by chunks of tokens: the logits of all tokens never stand in memory.

A chunk's gradients are made while its logits are there, in the forward pass, as those of the sum; the backward pass
only multiplies them by the gradient of the sum, which is one number. So there are three products, as where all logits
are kept; making the logits again in the backward pass would take a fourth. Torch's and Liger's work in the same way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_mamba.errors import UserError
from moe_mamba.kernels.cross_entropy import Reduce, cross_entropy, cross_entropy_with_gradient
from moe_mamba.kernels.products import Product, product_of
from moe_mamba.kernels.validation import require_dimensions, require_shapes

CHUNK = 2**28  # bytes of a chunk's logits; twice that is held where their gradient cannot take their place
# Of 50,304 words these are 1,334 tokens in fp32 and 2,668 in bf16: enough that adding a chunk's weight gradient to
# the others', a pass over the whole weight, takes little beside the products.
CACHED = 2**22  # the same on a CPU whose cache holds the weight too: there the logits never go to memory


def chunk_bytes(device: str, weight: int, is_whole: bool) -> int:
    """Most that a chunk's logits take.

    Args:
        device: type of the device that it lies on.
        weight: bytes of the head's weight on this rank.
        is_whole: whether that is the whole vocabulary's; ranks that share it talk with one another at every chunk.
    """
    return min(CACHED, CHUNK) if device == "cpu" and is_whole and weight <= CACHED else CHUNK


def held_chunks(device: str, is_whole: bool) -> int:
    """How often a chunk's logits stand in memory while there are gradients: C++ writes those in the logits' place.

    A CPU without C++ holds two, of which this says nothing.

    Args:
        device: see ``chunk_bytes``, as for the other.
        is_whole: see there.
    """
    return 1 if device == "cpu" and is_whole else 2


def linear_cross_entropy(
    stream: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first: int = 0,
    rows: int | None = None,
    reduce: Reduce | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum of the tokens' losses; its gradient reaches stream and weight, each in its own dtype.

    A weight of another dtype is cast to the stream's. Its gradient is summed over the chunks in fp32 at least.
    The backward pass may be taken once.

    Args:
        stream: (tokens, d_model).
        weight: (rows of this part of the vocabulary, d_model).
        targets: (tokens) int64, of the whole vocabulary; -100 is not counted.
        first: row of the vocabulary that the weight's first one is.
        rows: of the weight that are words; the others are padding, whose logits are minus infinity. None: all.
        reduce: see ``moe_mamba.kernels.cross_entropy``; called once for each chunk, in order. All parts have as many
            chunks, if their weights have as many rows.
        backend: of ``cross_entropy``.

    Returns:
        () in fp32, fp64 for an fp64 stream. See ``cross_entropy`` for targets outside the vocabulary.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    _check(stream, weight, targets)
    rows, product = weight.shape[0] if rows is None else rows, product_of(stream, backend)
    if torch.is_grad_enabled() and (stream.requires_grad or weight.requires_grad):

        def both_of(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            return cross_entropy_with_gradient(logits, targets[chunk], first, reduce, backend)

        return _ChunkedHead.apply(stream, weight, rows, both_of, product, reduce is None)
    chunks = _chunks(stream, weight, rows, product, reduce is None)
    return _sum([cross_entropy(one, targets[chunk], first, reduce, backend) for chunk, one in chunks], stream)


@torch.no_grad()
def linear_scores(
    stream: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    argmax: Callable[[Tensor], Tensor],
    first: int = 0,
    rows: int | None = None,
    reduce: Reduce | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of the tokens' losses, and how many targets have the largest logit, () int64; without gradients.

    Args:
        stream: see ``linear_cross_entropy``, as for all others.
        weight: see there.
        targets: see there.
        argmax: of (tokens, rows) logits, the ids in the whole vocabulary of the largest ones, (tokens).
        first: see there.
        rows: see there.
        reduce: see there.
        backend: see there.
    """
    _check(stream, weight, targets)
    losses, right, rows = [], targets.new_zeros(()), weight.shape[0] if rows is None else rows
    for chunk, logits in _chunks(stream, weight, rows, product_of(stream, backend), reduce is None):
        losses.append(cross_entropy(logits, targets[chunk], first, reduce, backend))
        right += (argmax(logits) == targets[chunk]).sum()  # no id is -100
    return _sum(losses, stream), right


class _ChunkedHead(torch.autograd.Function):
    """Keeps the gradients of the sum, and neither the stream nor the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        weight: Tensor,
        rows: int,
        both_of: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        product: Product,
        is_whole: bool,
    ) -> Tensor:
        """The sum of the losses; ``both_of`` a chunk's logits gives its losses and the gradient of their sum."""
        matrix, losses = weight.to(stream.dtype), []
        stream_gradient = torch.empty_like(stream) if ctx.needs_input_grad[0] else None
        total = _Total(matrix, product) if ctx.needs_input_grad[1] else None
        for chunk, logits in _chunks(stream, matrix, rows, product, is_whole):
            one, gradient = both_of(logits, chunk)  # (tokens of the chunk), (tokens of the chunk, rows)
            losses.append(one)
            if stream_gradient is not None:
                product(gradient, matrix, out=stream_gradient[chunk])
            if total is not None:
                total.add(gradient, stream[chunk])
            del gradient  # or it would stand beside the next chunk's
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(stream_gradient, None if total is None else total.sum())
        return _sum(losses, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """In place, for no second copy of the weight's gradient; torch refuses to come here twice."""
        stream_gradient, weight_gradient = ctx.saved_tensors
        if stream_gradient is not None:
            stream_gradient = stream_gradient.mul_(incoming)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(incoming).to(ctx.weight_dtype)
        return stream_gradient, weight_gradient, None, None, None, None


class _Total:
    """The weight's gradient: the sum of the chunks' products, in fp32 at least, in their order."""

    def __init__(self, weight: Tensor, product: Product) -> None:
        self._weight = weight
        self._product = product
        self._sum: Tensor | None = None

    def add(self, gradient: Tensor, stream: Tensor) -> None:
        """Add (tokens, rows)^T (tokens, d_model)."""
        if self._sum is None:
            self._sum = self._product(gradient.t(), stream)  # of a single chunk, it stays in the stream's dtype
            return
        wide = torch.promote_types(stream.dtype, torch.float32)
        if stream.dtype == wide:
            self._sum.addmm_(gradient.t(), stream)
            return
        self._sum = self._sum.to(wide)
        most = max(1, CHUNK // (stream.shape[1] * stream.itemsize))  # rows of a product, which is not in fp32
        for some, part in zip(self._sum.split(most), gradient.split(most, 1), strict=True):
            some += self._product(part.t(), stream)

    def sum(self) -> Tensor:
        """(rows, d_model)."""
        return torch.zeros_like(self._weight) if self._sum is None else self._sum


def _check(stream: Tensor, weight: Tensor, targets: Tensor) -> None:
    name = "linear_cross_entropy"
    require_dimensions(name, "stream", stream, "tokens d_model")
    require_dimensions(name, "weight", weight, "rows d_model")
    tokens, d_model = stream.shape
    require_shapes(name, (("weight", weight, (weight.shape[0], d_model)), ("targets", targets, (tokens,))))
    if targets.dtype != torch.int64:
        raise UserError(f"{name}: targets is {targets.dtype}, and must be torch.int64")


def _chunks(
    stream: Tensor, weight: Tensor, rows: int, product: Product, is_whole: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of tokens, of equal sizes but for the last, and their logits, in memory that the next chunk takes over."""
    tokens, weight = stream.shape[0], weight.to(stream.dtype)
    most = chunk_bytes(stream.device.type, weight.nbytes, is_whole)
    chunks = max(1, -(-tokens * weight.shape[0] * stream.itemsize // most))
    size = max(1, -(-tokens // chunks))
    buffer = stream.new_empty(min(size, tokens), weight.shape[0])
    for start in range(0, tokens, size):
        chunk = slice(start, min(start + size, tokens))
        logits = product(stream[chunk], weight.t(), out=buffer[: chunk.stop - start])
        logits[:, rows:] = -torch.inf
        yield chunk, logits


def _sum(losses: list[Tensor], stream: Tensor) -> Tensor:
    nothing = stream.new_zeros(0, dtype=torch.promote_types(stream.dtype, torch.float32))
    return torch.cat([nothing, *losses]).sum()
