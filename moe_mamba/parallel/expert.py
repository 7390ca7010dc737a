"""Expert parallelism: each rank holds a part of the experts, and rows travel to the rank of their expert and back.

The layer is the model's own; another dispatcher is all that changes. It is DeepSpeed's MoE by class, so that the engine
knows its experts: their gradients are summed over the ranks that hold the same ones, and ZeRO shards them there.

Rows are sent to their experts without waiting for them, and are waited for where the experts need them: what a layer's
other mixers compute in between takes the time of the journey, as it does of their gradients' way back. The experts'
outputs are waited for at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from moe_mamba.lean_import import lean_import
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.layer import ParallelMixers
from moe_mamba.model.mixers.dispatch import Dispatch, LocalDispatcher, Permutation
from moe_mamba.model.mixers.moe import Experts, MoE
from moe_mamba.model.mixers.routed_mamba import RoutedMamba
from moe_mamba.model.mixers.routing import RouterStatistics, Routing
from moe_mamba.model.sequences import Sequences
from moe_mamba.parallel.groups import Groups, expert_group_name
from moe_mamba.parallel.mappings import sum_over_ranks
from moe_mamba.parallel.placement import ParameterShard

with lean_import():
    from megatron.core.tensor_parallel import mappings


def spread_experts(
    model: LanguageModel, groups: Groups, held: dict[str, ParameterShard], sequence_parallel: bool
) -> None:
    """Leave every mixer that routes this rank's part of its experts, in place.

    Args:
        model: sharded by tensor, on the meta device; the caller makes that the default device.
        groups: from ``start_groups``.
        held: what this rank holds of each parameter.
        sequence_parallel: see ``tensor.shard_layers``.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedMamba) and groups.topology.inner_expert > 1:
            _spread_inner_experts(module, name, groups, held)
        elif isinstance(module, MoE):
            parent = model.get_submodule(name.rpartition(".")[0])
            joins = isinstance(parent, ParallelMixers) and groups.topology.expert_tensor
            model.set_submodule(name, ExpertParallelMoE(module, groups, sequence_parallel, joins))


def _spread_inner_experts(mixer: RoutedMamba, prefix: str, groups: Groups, held: dict[str, ParameterShard]) -> None:
    """Leave a mixer its part of the experts inside it; each rank of their group has the same channels."""
    for name, parameter in list(mixer.named_parameters()):
        shard = held[f"{prefix}.{name}"]
        if shard.experts is not None:
            owner, _, local = name.rpartition(".")
            setattr(mixer.get_submodule(owner), local, nn.Parameter(parameter.new_empty(shard.local_shape)))
    mixer.dispatcher = ExpertDispatcher(groups.topology.inner_expert, mixer.kernels)
    mixer.deepspeed_experts = InnerExperts(mixer.routing.experts, mixer.dispatcher, groups)


class InnerExperts(deepspeed.moe.layer.MoE):
    """What DeepSpeed's engine wants to find of experts inside a mixer: it computes nothing and owns nothing."""

    def __init__(self, experts: int, dispatcher: "ExpertDispatcher", groups: Groups) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size = experts, groups.topology.inner_expert
        self.num_local_experts = experts // self.ep_size
        self.expert_group_name = expert_group_name(groups.topology, "inner_expert")
        self.deepspeed_moe = dispatcher
        self.set_deepspeed_parallelism()  # type: ignore[operator]  # finds the group by its name


class ExpertParallelMoE(MoE, deepspeed.moe.layer.MoE):
    """A mixture of experts over the ranks of an expert group; takes over the router and shared experts of ``whole``.

    With tensor-parallel ranks the stream's tokens are sharded among them, and each rank sends its own; where experts
    are sharded by tensor, every rank works on the tokens of all ranks with its part of each expert's width instead.
    Without sequence parallelism each rank has all tokens: it sends a share of them, and gets the others' outputs.

    Where it joins other mixers, whose input is gathered and whose outputs are reduced together (``ParallelMixers``), it
    gets the tokens of all ranks, and gives its part of the sums.
    """

    def __init__(self, whole: MoE, groups: Groups, sequence_parallel: bool = True, joins: bool = False) -> None:
        nn.Module.__init__(self)  # DeepSpeed's would build its gate and its loop of experts
        topology = groups.topology
        # What DeepSpeed's engine reads.
        self.num_experts = whole.router.config.experts
        self.ep_size = topology.expert
        self.expert_group_name = expert_group_name(topology, "expert")
        self.num_local_experts = self.num_experts // topology.expert
        self.enable_expert_tensor_parallelism = topology.expert_tensor

        config, kernels, width = whole.experts.config, whole.experts.kernels, whole.experts.out_proj.shape[1]
        if topology.expert_tensor:
            width //= topology.tensor
        self.router = whole.router
        if topology.expert_tensor:
            self.router.ranks = topology.tensor
        self.experts = Experts(config, self.num_local_experts, width, kernels)
        self.shared = whole.shared
        self.dispatcher = self.deepspeed_moe = ExpertDispatcher(topology.expert, kernels)
        self._tensor = topology.tensor
        self._tensor_group = groups.tensor
        self._sequence_parallel = sequence_parallel
        self.leave: Callable[..., Tensor] = mappings.reduce_scatter_to_sequence_parallel_region
        self.gathers_tokens = joins  # type: ignore[misc]  # of this one, not of the class
        self.set_deepspeed_parallelism()  # type: ignore[operator]

    def start_routed(self, x: Tensor, sequences: Sequences) -> Callable[[], tuple[Tensor, RouterStatistics]]:
        """Begin the routed experts' part of the output for this rank's tokens, (tokens / tensor, d_model).

        Args:
            x: (tokens / tensor, d_model), this rank's part of the stream; all of it without sequence parallelism and
                where the layer joins others, as is the output then.
            sequences: of the whole stream.
        """
        if self.enable_expert_tensor_parallelism:
            return self._start_by_width(x, sequences)
        if self._tensor > 1 and not self._sequence_parallel:
            return self._start_whole(x, sequences)
        # Only expert choice looks at sequences, and its ranks hold whole ones.
        return super().start_routed(x, Sequences(sequences.batch // self._tensor, sequences.length))

    def _start_by_width(self, x: Tensor, sequences: Sequences) -> Callable[[], tuple[Tensor, RouterStatistics]]:
        """As ``start_routed``, where each tensor-parallel rank has a part of each expert's width."""
        group, enters = self._tensor_group, self._sequence_parallel and not self.gathers_tokens
        if enters:
            x = mappings.gather_from_sequence_parallel_region(x, group=group)  # (tokens, d_model)
        finish = super().start_routed(x, sequences)

        def finish_sums() -> tuple[Tensor, RouterStatistics]:
            y, statistics = finish()  # a part of each sum over an expert's width
            if enters:
                y = self.leave(y, group=group)
            elif not self.gathers_tokens:
                assert group is not None  # experts are sharded by tensor
                y = sum_over_ranks(y, group)
            return y, statistics

        return finish_sums

    def _start_whole(self, x: Tensor, sequences: Sequences) -> Callable[[], tuple[Tensor, RouterStatistics]]:
        """As ``start_routed``, of a stream (tokens, d_model) that every tensor-parallel rank has whole."""
        config, moe = self.experts.config, self.router.config
        if self.looks_ahead(config, moe) or self.depends_on_batch(config, moe):
            return super().start_routed(x, sequences)  # a token's experts depend on others: all are routed together
        assert self._tensor_group is not None
        share, group = -(-len(x) // self._tensor), self._tensor_group
        padded = functional.pad(x, (0, 0, 0, share * self._tensor - len(x)))
        finish = super().start_routed(padded.split(share)[group.rank()], Sequences(share, 1))

        def finish_for_all() -> tuple[Tensor, RouterStatistics]:
            y, statistics = finish()
            return mappings.gather_from_sequence_parallel_region(y, group=group)[: len(x)], statistics

        return finish_for_all


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

    def plan(self, routing: Routing) -> Dispatch:
        """Find out which rows come from which rank; where there is no capacity, ranks exchange their numbers."""
        if self._ranks == 1:
            return super().plan(routing)
        assert self._group is not None
        counts = routing.counts
        if routing.capacity is not None:
            here = self._ranks * counts[: len(counts) // self._ranks]
            travel = _FixedTravel(self._group, here, self._ranks, routing.capacity)
            return Dispatch(routing, here, self._ranks * routing.capacity, travel)
        received = mappings.all_to_all(self._group, counts).view(self._ranks, -1)
        sent_splits, received_splits = self.read_sizes(routing, received)
        plan = _VariableTravel.plan(self._group, received, sent_splits, received_splits)
        return Dispatch(routing, plan.counts, None, plan)

    def read_sizes(self, routing: Routing, received: Tensor) -> tuple[list[int], list[int]]:
        """How many rows go to each rank, and come from each: read from the device, which is waited for, once.

        A collective's sizes are known on the host; nothing else of a step is.

        Args:
            routing: of this rank's tokens.
            received: (ranks, local experts) int64, rows that come from each rank for each expert here.
        """
        sent = routing.counts.view(self._ranks, -1)
        sent_splits, received_splits = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        return sent_splits, received_splits

    def send(self, x: Tensor, dispatch: Dispatch) -> Callable[[], Tensor]:
        """Gather the tokens in the order of the experts, and send them to these."""
        receive, travel = super().send(x, dispatch), dispatch.travel
        return receive if travel is None else travel.there(receive())

    def combine(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Bring the outputs back, and sum those of a token's experts."""
        travel = dispatch.travel
        return super().combine(rows if travel is None else travel.back(rows), dispatch)

    def combine_unweighted(self, outputs: Sequence[Tensor], dispatch: Dispatch) -> list[Tensor]:
        """Bring all outputs back in one journey, and sum those of a token's experts."""
        travel = dispatch.travel
        if travel is None:
            return super().combine_unweighted(outputs, dispatch)
        together = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=-1)
        (summed,) = super().combine_unweighted([travel.back(together)], dispatch)
        return list(summed.split([rows.shape[1] for rows in outputs], dim=-1))


@dataclass
class _Exchange:
    """An all-to-all of rows that is begun at one place of a pass and waited for at another.

    The gradients go the other way between the same two places: begun where the rows were waited for, waited for where
    they were begun. Autograd does what was computed between the two places in between as well.

    Attributes:
        group: the ranks.
        sent_splits: rows to each rank; None: as many to each.
        received_splits: rows from each rank; None: as many from each.
        work: what is to be waited for.
        arriving: memory in which the rows are then.
    """

    group: ProcessGroup
    sent_splits: list[int] | None = None
    received_splits: list[int] | None = None
    work: dist.Work | None = None
    arriving: Tensor | None = None

    def begin(self, rows: Tensor, is_back: bool = False) -> None:
        """Send ``rows``; the gradients of rows are on their way back."""
        sent, received = self.sent_splits, self.received_splits
        if is_back:
            sent, received = received, sent
        self.arriving = rows.new_empty((len(rows) if received is None else sum(received), *rows.shape[1:]))
        self.work = dist.all_to_all_single(self.arriving, rows.contiguous(), received, sent, self.group, async_op=True)

    def wait(self) -> Tensor:
        """The rows, when they are there."""
        work, arrived = self.work, self.arriving
        assert work is not None
        assert arrived is not None
        work.wait()
        self.work = self.arriving = None
        return arrived


class _Leave(torch.autograd.Function):
    """Begin an exchange; gives the rows that are sent, which stand for those that come (autograd wants their shape)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Arrive(torch.autograd.Function):
    """Wait for an exchange."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, sent.shape
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.begin(gradient, is_back=True)
        return gradient.new_zeros(1).expand(ctx.shape), None  # nobody reads it: the gradient is still on its way


def _exchanged(rows: Tensor, exchange: _Exchange) -> Callable[[], Tensor]:
    """Begin an exchange; what is returned waits for it."""
    sent = _Leave.apply(rows, exchange)
    return lambda: _Arrive.apply(sent, exchange)


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

    def there(self, rows: Tensor) -> Callable[[], Tensor]:
        """Send rows sorted by (expert); what is returned waits for those of this rank's, sorted by (expert, source)."""
        receive = _exchanged(rows, _Exchange(self.group))  # (source, expert, capacity) x width
        return lambda: self._swap(receive(), self.ranks, len(self.counts))

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
    def plan(
        cls, group: ProcessGroup, received: Tensor, sent_splits: list[int], received_splits: list[int]
    ) -> "_VariableTravel":
        """Order the rows that come, ``received`` (ranks, local experts) int64 of each."""
        rows, (ranks, experts) = sum(received_splits), received.shape
        expert = torch.arange(experts, device=received.device).repeat(ranks)
        expert = expert.repeat_interleave(received.reshape(-1), output_size=rows)  # (rows,) sorted by source
        order = expert.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
        return cls(group, received.sum(0), sent_splits, received_splits, order, place)

    def there(self, rows: Tensor) -> Callable[[], Tensor]:
        """Send rows sorted by (expert); what is returned waits for those of this rank's, sorted by (expert, source)."""
        receive = _exchanged(rows, _Exchange(self.group, self.sent_splits, self.received_splits))
        return lambda: Permutation.apply(receive(), self.order, self.place)

    def back(self, rows: Tensor) -> Tensor:
        """Undo ``there``."""
        rows = Permutation.apply(rows, self.place, self.order)
        return mappings.all_to_all(self.group, rows, self.sent_splits, self.received_splits)
