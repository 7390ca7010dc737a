"""Cross entropy in chunks of tokens: one buffer of a few MiB is all that is ever in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_mamba.kernels.cross_entropy import Reduce
from moe_mamba.kernels.cross_entropy.function import CrossEntropy, define_parts, with_gradient

CHUNK = 1 << 19  # logits of a chunk: 2 MiB in fp32, which stay in a CPU's cache
ON_ACCELERATOR = 16  # times as many there, where small kernels wait for their launch


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(logits.dtype, torch.float32)
    largest, total = (torch.empty(logits.shape[0], dtype=work, device=logits.device) for _ in range(2))
    for chunk, buffer in _chunks(logits, work):
        wide = logits[chunk] if logits.dtype == work else buffer.copy_(logits[chunk])
        torch.amax(wide, 1, out=largest[chunk])
        shift = largest[chunk].masked_fill(largest[chunk] == -torch.inf, 0)[:, None]
        torch.sum(torch.sub(wide, shift, out=buffer).exp_(), 1, out=total[chunk])
    is_inside = (local >= 0) & (local < logits.shape[1])
    predicted = logits.gather(1, local.masked_fill(~is_inside, 0)[:, None])[:, 0].to(work)
    return largest, total, predicted.masked_fill_(~is_inside, 0)


def _gradient(logits: Tensor, local: Tensor, log_sum: Tensor, incoming: Tensor) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    is_inside = (local >= 0) & (local < logits.shape[1])
    place = local.masked_fill(~is_inside, 0)[:, None]
    one = is_inside.to(log_sum.dtype)[:, None].neg()
    for chunk, buffer in _chunks(logits, log_sum.dtype):
        is_wide = gradient.dtype == buffer.dtype
        out = gradient[chunk] if is_wide else buffer
        torch.sub(logits[chunk] if is_wide else buffer.copy_(logits[chunk]), log_sum[chunk, None], out=out).exp_()
        out.scatter_add_(1, place[chunk], one[chunk])
        out.mul_(incoming[chunk, None])
        if not is_wide:
            gradient[chunk] = buffer
    ignored = log_sum == torch.inf
    if gradient.device.type == "cpu":  # writes the few ignored tokens only
        return gradient.index_fill_(0, ignored.nonzero()[:, 0], 0)
    return gradient.masked_fill_(ignored[:, None], 0)  # nonzero would make the host wait for an accelerator


def _chunks(logits: Tensor, work: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of tokens, and the part of one buffer that has each chunk's shape."""
    tokens, rows = logits.shape
    size = CHUNK if logits.device.type == "cpu" else CHUNK * ON_ACCELERATOR
    count = min(tokens, max(1, size // rows))
    buffer = logits.new_empty(count, rows, dtype=work)
    for start in range(0, tokens, max(count, 1)):
        chunk = slice(start, min(start + count, tokens))
        yield chunk, buffer[: chunk.stop - start]


statistics, gradient = define_parts("torch", _statistics, _gradient)


def cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``."""
    return CrossEntropy.apply(logits, targets, first, reduce, statistics, gradient)


def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.cross_entropy``; the gradient is new memory."""
    return with_gradient(logits, targets, first, reduce, statistics, gradient)
