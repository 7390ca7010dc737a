"""The weights of a rank: the part of every logical weight that the layout gives it, and no more."""

import torch
from torch import Tensor

from moe_mamba.model.initialize import LogicalWeight, logical_weights
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.placement import ParameterShard


def initialize_shards(model: LanguageModel, whole: LanguageModel, shards: dict[str, ParameterShard], seed: int) -> None:
    """Fill this rank's parameters and buffers with its parts of the weights that one process would start with.

    Args:
        model: sharded for the layout, with memory.
        whole: the whole model, on the meta device.
        shards: what this rank holds of each name.
        seed: of the run.
    """
    fill(dict(model.named_parameters()) | dict(model.named_buffers()), whole, shards, seed)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], whole: LanguageModel, shards: dict[str, ParameterShard], seed: int) -> None:
    """As ``initialize_shards``, for some of the parameters and buffers, by full name.

    One logical weight exists at a time (of one expert, where experts are stacked), and only if this rank holds some of
    it. Padding is zero.
    """
    for name, tensor in tensors.items():
        if shards[name].is_padded:
            tensor.zero_()
    for weight in logical_weights(whole, seed):
        if weight.path in tensors:
            _fill(tensors[weight.path], shards[weight.path], weight)


def _fill(target: Tensor, shard: ParameterShard, weight: LogicalWeight) -> None:
    chunks = [(logical, target[local]) for logical, local in shard.chunks()]
    if weight.expert is not None:
        chunks = [
            (logical[1:], chunk[weight.expert - logical[0]])
            for logical, chunk in chunks
            if logical[0] <= weight.expert < logical[0] + len(chunk)
        ]
    value = weight.make() if chunks else None
    for logical, chunk in chunks:
        assert value is not None
        chunk.copy_(value[tuple(slice(start, start + size) for start, size in zip(logical, chunk.shape, strict=True))])
