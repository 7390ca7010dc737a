"""Expert parallelism: each rank holds a part of the experts, and rows travel to the rank of their expert and back.

The layer is the model's own; another dispatcher is all that changes. It is DeepSpeed's MoE by class, so that the engine
knows its experts: their gradients are summed over the ranks that hold the same ones, and ZeRO shards them there.
"""

from dataclasses import dataclass, fields
from typing import Any

import deepspeed.moe.layer
import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.moe import Experts, LocalDispatcher, MoE
from moe_mamba.model.mixers.routing import RouterStatistics, Routing
from moe_mamba.model.sequences import Sequences
from moe_mamba.parallel.groups import Groups


def spread_experts(model: LanguageModel, groups: Groups, sequence_parallel: bool) -> None:
    """Replace every mixture of experts by one that holds this rank's part of them, in place.

    Args:
        model: a whole one, on the meta device; the caller makes that the default device.
        groups: from ``start_groups``.
        sequence_parallel: see ``tensor.shard_layers``.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, MoE):
            model.set_submodule(name, ExpertParallelMoE(module, groups, sequence_parallel))


class ExpertParallelMoE(MoE, deepspeed.moe.layer.MoE):
    """A mixture of experts over the ranks of an expert group; takes over the router and shared experts of ``whole``.

    With tensor-parallel ranks the stream's tokens are sharded among them, and each rank sends its own; where experts
    are sharded by tensor, every rank works on the tokens of all ranks with its part of each expert's width instead.
    Without sequence parallelism each rank has all tokens: it sends a share of them, and gets the others' outputs.
    """

    def __init__(self, whole: MoE, groups: Groups, sequence_parallel: bool = True) -> None:
        nn.Module.__init__(self)  # DeepSpeed's would build its gate and its loop of experts
        topology = groups.topology
        # What DeepSpeed's engine reads.
        self.num_experts = whole.router.config.experts
        self.ep_size = topology.expert
        self.expert_group_name = f"ep_size_{topology.expert}"
        self.num_local_experts = self.num_experts // topology.expert
        self.enable_expert_tensor_parallelism = topology.expert_tensor

        config, kernels, width = whole.experts.config, whole.experts.kernels, whole.experts.out_proj.shape[1]
        if topology.expert_tensor:
            width //= topology.tensor
        self.router = whole.router
        self.experts = Experts(config, self.num_local_experts, width, kernels)
        self.shared = whole.shared
        self.dispatcher = self.deepspeed_moe = ExpertDispatcher(topology.expert, kernels)
        self._tensor = topology.tensor
        self._tensor_group = groups.tensor
        self._sequence_parallel = sequence_parallel
        self.set_deepspeed_parallelism()  # type: ignore[operator]

    def routed(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, RouterStatistics]:
        """Give the routed experts' part of the output for this rank's tokens, (tokens / tensor, d_model).

        Args:
            x: (tokens / tensor, d_model), this rank's part of the stream; all of it without sequence parallelism, as
                is the output then.
            sequences: of the whole stream.
        """
        if self._tensor > 1 and not self._sequence_parallel:
            return self._routed_whole(x, sequences)
        if not self.enable_expert_tensor_parallelism:
            # Only expert choice looks at sequences, and its ranks hold whole ones.
            return super().routed(x, Sequences(sequences.batch // self._tensor, sequences.length))
        x = mappings.gather_from_sequence_parallel_region(x, group=self._tensor_group)  # (tokens, d_model)
        y, statistics = super().routed(x, sequences)  # a part of each sum over an expert's width
        y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self._tensor_group)
        # All ranks counted all tokens: each answers for its share, so that the sum over ranks counts once.
        shares = {field.name: getattr(statistics, field.name) / self._tensor for field in fields(statistics)}
        return y, RouterStatistics(**shares)

    def _routed_whole(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, RouterStatistics]:
        """As ``routed``, of a stream (tokens, d_model) that every tensor-parallel rank has whole."""
        if self.enable_expert_tensor_parallelism:
            y, statistics = super().routed(x, sequences)  # a part of each sum over an expert's width
            return mappings.reduce_from_tensor_model_parallel_region(y, group=self._tensor_group), statistics
        config, moe = self.experts.config, self.router.config
        if self.looks_ahead(config, moe) or self.depends_on_batch(config, moe):
            return super().routed(x, sequences)  # a token's experts depend on others, so all are routed together
        assert self._tensor_group is not None
        share = -(-len(x) // self._tensor)
        padded = functional.pad(x, (0, 0, 0, share * self._tensor - len(x)))
        y, statistics = super().routed(padded.split(share)[self._tensor_group.rank()], Sequences(share, 1))
        return mappings.gather_from_sequence_parallel_region(y, group=self._tensor_group)[: len(x)], statistics


class ExpertDispatcher(LocalDispatcher):
    """Sends rows to the ranks of their experts, and their outputs back to be weighted and summed.

    All ranks of the expert group must pass at once, in the same mode, with as many tokens where there is a capacity.
    """

    def __init__(self, ranks: int, kernels: str) -> None:
        super().__init__(kernels)
        self._ranks = ranks
        self._group: ProcessGroup | None = None

    def _set_ep_group(self, group: ProcessGroup) -> None:
        """Take the expert group; DeepSpeed's MoE calls this."""
        self._group = group

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Gather the tokens in the order of the experts, and exchange them."""
        rows, counts, _ = super().dispatch(x, routing)
        if self._ranks == 1:
            return rows, counts, (routing, None)
        assert self._group is not None
        travel: _FixedTravel | _VariableTravel
        if routing.capacity is not None:
            here = self._ranks * counts[: len(counts) // self._ranks]
            travel = _FixedTravel(self._group, here, self._ranks, routing.capacity)
        else:
            travel = _VariableTravel.plan(self._group, self._ranks, counts)
        return travel.there(rows), travel.counts, (routing, travel)

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Bring the outputs back, and sum a token's weighted ones."""
        routing, travel = handle
        return super().combine(rows if travel is None else travel.back(rows), routing)


@dataclass(frozen=True)
class _FixedTravel:
    """Every expert has ``capacity`` rows from every rank, so no size depends on the data.

    Attributes:
        group: expert-parallel ranks.
        counts: (local experts,) rows of each expert here.
        ranks: in the group.
        capacity: rows of an expert from each rank.
    """

    group: ProcessGroup
    counts: Tensor
    ranks: int
    capacity: int

    def there(self, rows: Tensor) -> Tensor:
        """Turn rows sorted by (expert) into the rows of this rank's experts, sorted by (expert, source)."""
        rows = mappings.all_to_all(self.group, rows)  # (source, expert, capacity) x d_model
        return self._swap(rows, self.ranks, len(self.counts))

    def back(self, rows: Tensor) -> Tensor:
        """Undo ``there``."""
        return mappings.all_to_all(self.group, self._swap(rows, len(self.counts), self.ranks))

    def _swap(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        return rows.view(outer, inner, self.capacity, -1).transpose(0, 1).reshape(rows.shape)


@dataclass(frozen=True)
class _VariableTravel:
    """Ranks tell one another how many rows come, before they come.

    Attributes:
        group: expert-parallel ranks.
        counts: (local experts,) rows of each expert here.
        sent_splits: rows to each rank.
        received_splits: rows from each rank.
        order: where, among the rows as they come, each row of the order by expert lies.
        place: the inverse of ``order``.
    """

    group: ProcessGroup
    counts: Tensor
    sent_splits: list[int]
    received_splits: list[int]
    order: Tensor
    place: Tensor

    @classmethod
    def plan(cls, group: ProcessGroup, ranks: int, counts: Tensor) -> "_VariableTravel":
        """Exchange ``counts`` (experts,); reads sizes from the device, once."""
        received = mappings.all_to_all(group, counts).view(ranks, -1)
        sent_splits, received_splits = torch.stack([counts.view(ranks, -1).sum(1), received.sum(1)]).tolist()
        rows, experts = sum(received_splits), received.shape[1]
        expert = torch.arange(experts, device=counts.device).repeat(ranks)
        expert = expert.repeat_interleave(received.reshape(-1), output_size=rows)  # (rows,) sorted by source
        order = expert.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
        return cls(group, received.sum(0), sent_splits, received_splits, order, place)

    def there(self, rows: Tensor) -> Tensor:
        """Turn rows sorted by (expert) into the rows of this rank's experts, sorted by (expert, source)."""
        rows = mappings.all_to_all(self.group, rows, self.received_splits, self.sent_splits)
        return _Permutation.apply(rows, self.order, self.place)

    def back(self, rows: Tensor) -> Tensor:
        """Undo ``there``."""
        rows = _Permutation.apply(rows, self.place, self.order)
        return mappings.all_to_all(self.group, rows, self.sent_splits, self.received_splits)


class _Permutation(torch.autograd.Function):
    """Rows in another order; the gradient is gathered by the inverse, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
