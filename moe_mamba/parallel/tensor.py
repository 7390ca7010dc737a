"""Tensor parallelism: every layer sharded among tensor-parallel ranks, the residual stream too.

The collectives with their gradients (mappings) and the embedding are megatron-core's; see docs/design.md.

Between mixers each rank holds its share of the stream's tokens (sequence parallelism; Korthikanti et al., 2022). A
mixer's input is gathered once, whatever number of projections read it; each rank computes its channels, heads or
hidden units for all tokens; the output projection's partial sums are reduce-scattered back to shares of tokens.
Inside a Mamba mixer, what x_proj makes of the channels (delta's low rank, B, C) is a sum over all channels, so it is
reduced, and because every rank's channels use it, its gradient is reduced as well. Logits stay sharded by vocabulary.

A step of generation has fewer tokens than ranks may be: without sequence parallelism every rank has the whole stream,
nothing is gathered, and partial sums are reduced for all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from moe_mamba.lean_import import lean_import
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.layer import ParallelMixers
from moe_mamba.model.linear import Linear
from moe_mamba.model.mixers.base import Mixer
from moe_mamba.model.mixers.inner_experts import SwitchExperts
from moe_mamba.model.mixers.routed_mamba import RoutedMamba
from moe_mamba.model.mixers.routing import Router
from moe_mamba.parallel.groups import Groups
from moe_mamba.parallel.mappings import share_with_ranks, sum_over_ranks
from moe_mamba.parallel.placement import ParameterShard

with lean_import():
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )


def shard_layers(
    model: LanguageModel, groups: Groups, shards: dict[str, ParameterShard], sequence_parallel: bool
) -> None:
    """Put this rank's linears and embedding in the place of a whole model's, in place.

    Args:
        model: on the meta device.
        groups: of a layout with tensor-parallel ranks.
        shards: what this rank holds of each parameter.
        sequence_parallel: each rank has its share of the stream's tokens; False: all of them, for passes without
            gradients.
    """
    assert groups.tensor is not None
    _shard_vocabulary(model, groups.tensor, shards, sequence_parallel)
    joined = _join_mixers(model, groups.tensor, groups.topology.expert_tensor, sequence_parallel)
    for name, module in list(model.named_modules()):
        if isinstance(module, Mixer) and module.gathers_tokens:
            _shard_mixer(module, name, groups.tensor, shards, sequence_parallel, module in joined)


def _join_mixers(model: LanguageModel, group: ProcessGroup, expert_tensor: bool, sequence_parallel: bool) -> set[Mixer]:
    """Gather the tokens once, and reduce once, for all mixers of a layer whose ranks have parts of their sums.

    Returns:
        Those mixers, and what stands in them.
    """
    joined: set[Mixer] = set()
    for layer in model.layers:
        if isinstance(layer.mixer, ParallelMixers):
            if sequence_parallel:
                layer.mixer.gather = partial(gather_from_sequence_parallel_region, group=group)
            layer.mixer.reduce = partial(_leave(sequence_parallel), group=group)
            for mixer in layer.mixers:  # type: ignore[union-attr]
                if mixer.gathers_tokens or (mixer.routes and expert_tensor):
                    joined.update(module for module in mixer.modules() if isinstance(module, Mixer))
    return joined


def _shard_mixer(
    mixer: nn.Module,
    prefix: str,
    group: ProcessGroup,
    shards: dict[str, ParameterShard],
    sequence_parallel: bool,
    joins: bool,
) -> None:
    """Shard all that a mixer owns, and gather the tokens of the ranks at its entry unless it joins others."""
    for name, linear in list(mixer.named_modules()):
        if isinstance(linear, nn.Linear):
            shard = shards[f"{prefix}.{name}.weight"]
            mixer.set_submodule(name, _shard_linear(linear, shard, group, sequence_parallel, joins))
    for name, parameter in list(mixer.named_parameters()):
        shard = shards[f"{prefix}.{name}"]
        owner, _, local = name.rpartition(".")
        module = mixer.get_submodule(owner)
        if parameter.shape != shard.local_shape:
            setattr(module, local, nn.Parameter(parameter.new_empty(shard.local_shape)))
        if isinstance(module, Router):
            module.ranks = group.size()
            if shard.is_reduced:  # it reads channels
                module.reduce = partial(_reduce_for_all, group=group)
        elif isinstance(module, SwitchExperts) and local == "in_proj":
            if shard.is_reduced:
                module.reduce = partial(_reduce_units, units=module.fan_ins[1], group=group)
            else:
                module.gather = partial(_gather_units, group=group)
    if isinstance(mixer, RoutedMamba) and not joins:  # its sums may leave it without a linear layer
        mixer.reduce = partial(_leave(sequence_parallel), group=group)
    if sequence_parallel and not joins:
        mixer.register_forward_pre_hook(partial(_gather_tokens, group))


def _shard_linear(
    linear: nn.Linear, shard: ParameterShard, group: ProcessGroup, sequence_parallel: bool, joins: bool
) -> nn.Module:
    if shard.tensor_axis is None:
        return linear
    if shard.tensor_axis == 0:
        return _column_linear(linear, shard)
    if joins and not shard.is_reduced:
        return PartialLinear(linear, shard, group)
    return (ReducedLinear if shard.is_reduced or not sequence_parallel else RowLinear)(linear, shard, group)


def _column_linear(linear: nn.Linear, shard: ParameterShard) -> nn.Linear:
    """Each rank has some outputs, of all tokens; the entry's gather sums the gradient of the input."""
    sizes, has_bias = (linear.in_features, shard.local_shape[0]), linear.bias is not None
    return Linear(*sizes, has_bias, linear.product) if isinstance(linear, Linear) else nn.Linear(*sizes, has_bias)


def _gather_tokens(group: ProcessGroup, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All ranks' tokens for a mixer: (tokens / tensor, d_model) -> (tokens, d_model); backward: a reduce-scatter."""
    stream, *rest = arguments
    return gather_from_sequence_parallel_region(stream, group=group), *rest


def _gather_units(hidden: Tensor, *, group: ProcessGroup) -> Tensor:
    """All hidden units, (rows, units), from this rank's, (rows, units / tensor)."""
    return gather_from_sequence_parallel_region(hidden.t().contiguous(), group=group).t()


def _leave(sequence_parallel: bool) -> Callable[..., Tensor]:
    """How partial sums leave a mixer: each rank gets the sums of its tokens, or all of them."""
    return reduce_scatter_to_sequence_parallel_region if sequence_parallel else sum_over_ranks


def _reduce_for_all(partial_sums: Tensor, *, group: ProcessGroup) -> Tensor:
    """The whole sum on all ranks, and the sum of what each of them does with it."""
    return share_with_ranks(sum_over_ranks(partial_sums, group), group)


def _reduce_units(partial_sums: Tensor, *, units: int, group: ProcessGroup) -> Tensor:
    """Inputs of this rank's hidden units, (rows, gates x units / tensor), of its part of all, (rows, gates x units)."""
    by_unit = partial_sums.unflatten(1, (-1, units)).permute(2, 0, 1).contiguous()  # (units, rows, gates)
    mine = reduce_scatter_to_sequence_parallel_region(by_unit, group=group)
    return mine.permute(1, 2, 0).flatten(1)


class RowLinear(nn.Linear):
    """Each rank has some inputs; partial sums are reduce-scattered over tokens, and only then is a bias added.

    So it is added once to each token. Every rank has the whole bias, and its gradient from its own tokens: a replica's.

    Attributes:
        product: of an input (..., in) and a weight (out, in); ZeRO-3 puts its own in this place.
    """

    def __init__(self, linear: nn.Linear, shard: ParameterShard, group: ProcessGroup) -> None:
        super().__init__(shard.local_shape[1], linear.out_features, bias=linear.bias is not None)
        self.group = group
        self.product = linear.product if isinstance(linear, Linear) else functional.linear

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's ``x`` (tokens, in / tensor) to (tokens / tensor, out)."""
        y = self._reduce(self.product(x, self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _reduce(self, partial_sums: Tensor) -> Tensor:
        return reduce_scatter_to_sequence_parallel_region(partial_sums, group=self.group)


class PartialLinear(RowLinear):
    """Each rank has some inputs, and gives its part of the sums; the first rank's has the bias, which counts once."""

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's ``x`` (tokens, in / tensor) to a summand of (tokens, out)."""
        y = self.product(x, self.weight)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype) * float(self.group.rank() == 0)  # the others' gradients are zeros, not None


class ReducedLinear(RowLinear):
    """Each rank has some inputs; all ranks get the whole sum, and the sum of what each of them does with it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's ``x`` (..., in / tensor) to (..., out), the same on all ranks."""
        return share_with_ranks(super().forward(x), self.group)

    def _reduce(self, partial_sums: Tensor) -> Tensor:
        return sum_over_ranks(partial_sums, self.group)


class VocabularyEmbedding(VocabParallelEmbedding):
    """Each rank has some rows; what it finds is reduce-scattered over tokens, or reduced for all ranks."""

    def __init__(
        self, embedding: nn.Embedding, shard: ParameterShard, group: ProcessGroup, sequence_parallel: bool
    ) -> None:
        super().__init__(
            shard.local_shape[0] * group.size(),
            embedding.embedding_dim,
            reduce_scatter_embeddings=sequence_parallel,
            # Its weight is made and filled by us.
            config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
            init_method=_no_initialization,
            tp_group=group,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up ``tokens`` (tokens,): this rank's share, (tokens / tensor, d_model), or all, (tokens, d_model)."""
        found = super().forward(tokens[None])
        # megatron-core wants a batch first and gives it second, where it scatters
        return found.squeeze(1 if self.reduce_scatter_embeddings else 0)


def _no_initialization(weight: Tensor) -> None:
    raise AssertionError("weights are filled by parallel/initialize.py")


def _shard_vocabulary(
    model: LanguageModel, group: ProcessGroup, shards: dict[str, ParameterShard], sequence_parallel: bool
) -> None:
    shard = shards["embedding.weight"]
    model.embedding = VocabularyEmbedding(model.embedding, shard, group, sequence_parallel)
    if model.head is not None:
        model.head = _column_linear(model.head, shards["head.weight"])
    (segment,) = shard.segments[0]
    sequence_group, first = group if sequence_parallel else None, group.rank() * shard.local_shape[0]
    model.project = partial(project, rows=segment.length, group=sequence_group, product=model.project)
    part: dict[str, Any] = {"first": first, "rows": segment.length, "reduce": partial(_reduce, group=group)}
    cross_entropy = partial(model.cross_entropy, **part)
    argmax = partial(_argmax, first=first, group=group)
    scores = partial(model.scores, argmax=argmax, **part)  # type: ignore[call-arg]
    model.cross_entropy = partial(_of_all_tokens, cross_entropy, sequence_group)
    model.scores = partial(_of_all_tokens, scores, sequence_group)
    model.gather_logits = partial(_gather_logits, vocabulary=shard.shape[0], group=group)


def project(
    stream: Tensor,
    weight: Tensor,
    *,
    rows: int,
    group: ProcessGroup | None,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Logits of this rank's part of the vocabulary.

    Args:
        stream: (tokens / tensor, d_model), normalised; without a group all tokens, (tokens, d_model).
        weight: (rows of a rank, d_model), padded.
        rows: how many of them are tokens of the vocabulary; the logits of the others are minus infinity.
        group: the tensor-parallel ranks, which share the tokens; None: each has all.
        product: of a stream and a weight; ZeRO-3 gives its own.

    Returns:
        (tokens, rows of a rank).
    """
    logits = _of_all_tokens(product, group, stream, weight)
    logits[:, rows:] = -torch.inf
    return logits


def _of_all_tokens(function: Callable[..., Any], group: ProcessGroup | None, stream: Tensor, *arguments: Tensor) -> Any:
    """What a function makes of the stream of all tokens, (tokens, d_model).

    Args:
        function: of that stream and the other arguments.
        group: the tensor-parallel ranks, which share the tokens; None: each has all.
        stream: (tokens / tensor, d_model), or all.
        arguments: of the function.
    """
    if group is not None:
        stream = gather_from_sequence_parallel_region(stream, group=group)
    return function(stream, *arguments)


def _gather_logits(logits: Tensor, *, vocabulary: int, group: ProcessGroup) -> Tensor:
    """Logits of the whole vocabulary, on every rank, from all ranks' parts: (..., rows) -> (..., vocabulary)."""
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., :vocabulary]


def _argmax(logits: Tensor, *, first: int, group: ProcessGroup) -> Tensor:
    """Ids of the largest logits over all ranks' parts of the vocabulary, of equal ones the first: (..., rows) -> (...).

    Args:
        logits: this rank's part.
        first: id of its first row.
        group: the tensor-parallel ranks.
    """
    largest, row = logits.max(-1)
    highest = largest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    best = torch.where(largest == highest, row + first, torch.iinfo(row.dtype).max)
    dist.all_reduce(best, op=dist.ReduceOp.MIN, group=group)
    return best


def _reduce(largest: Tensor, total: Tensor, predicted: Tensor, *, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """What all ranks' parts of the logits have together, (tokens,) each; the logits are never gathered.

    Args:
        largest: logit.
        total: sum of exp(logit - largest).
        predicted: the target's logit, 0 where another rank has it, or none.
        group: the tensor-parallel ranks.
    """
    highest = largest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((total * torch.exp(largest - highest), predicted))
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1]
