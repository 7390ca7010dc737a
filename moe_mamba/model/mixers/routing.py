"""Which expert sees which token, and with which weight.

A router gives scores to every pair of token and expert, from logits in fp32. Then either each token takes its best
experts (Switch, Fedus et al., 2021; top-k, Shazeer et al., 2017), with a capacity or without one, or each expert
takes its best tokens (expert choice, Zhou et al., 2022). The result lists rows sorted by expert, which is what a
dispatcher and a grouped matmul want. No shape depends on the data, so a GPU is never waited for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.config import MoEConfig
from moe_mamba.kernels import Order, sort_by_expert
from moe_mamba.model.initialize import Initializer, truncated_normal, zeros
from moe_mamba.model.precision import without_autocast
from moe_mamba.model.sequences import Sequences


@dataclass(frozen=True)
class Routing:
    """What the experts shall work on: rows sorted by expert.

    Attributes:
        token: (rows,) int64: the row of the stream that goes to the expert.
        weight: (rows,): what the expert's output is multiplied by; 0 in a slot that stayed empty.
        slot: (tokens, choices) int64: the row of each choice, -1 where the expert had no room; for expert choice,
            (tokens, experts), -1 where the expert did not take the token.
        counts: (experts,) int64: rows of each expert, empty slots included.
        assigned: (experts,) int64: assignments of each expert, counted before any is dropped.
        dropped: () assignments that no expert had room for; for expert choice, tokens that no expert took.
        capacity: rows of every expert, where all have as many; None: only ``counts`` knows.
    """

    token: Tensor
    weight: Tensor
    slot: Tensor
    counts: Tensor
    assigned: Tensor
    dropped: Tensor
    capacity: int | None = None

    def unweighted(self) -> Tensor:
        """(rows,): 1 in the place of ``weight``, and 0 in a slot that stayed empty."""
        if self.capacity is None:
            return torch.ones_like(self.weight)
        rows = len(self.token)
        place = torch.where(self.slot < 0, rows, self.slot).view(-1)
        return self.weight.new_zeros(rows + 1).index_fill(0, place, 1.0)[:rows]


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over the tokens of one layer of a micro-step; fp32 (float64 in a float64 model).

    Attributes:
        probability: (experts,) sum of each expert's share of a token's scores; carries the gradient.
        assigned: (experts,) assignments, counted before any is dropped.
        dropped: () as in ``Routing``.
        z: () sum of the squared log-sum-exp of the logits; carries the gradient.
        entropy: () sum of the entropy of a token's shares, in nats.
        tokens: () how many tokens.
    """

    probability: Tensor
    assigned: Tensor
    dropped: Tensor
    z: Tensor
    entropy: Tensor
    tokens: Tensor

    def divided_by(self, count: int) -> "RouterStatistics":
        """An even share of all sums."""
        return RouterStatistics(**{field.name: getattr(self, field.name) / count for field in fields(self)})


def balance_loss(statistics: RouterStatistics) -> Tensor:
    """Switch Transformer's load-balancing loss, eq. 4, without its weight: 1 when the load is even."""
    mean = statistics.probability / statistics.tokens
    share = statistics.assigned / statistics.assigned.sum()
    return len(share) * (mean * share).sum()


def z_loss(statistics: RouterStatistics) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al., 2022, eq. 5), without its weight."""
    return statistics.z / statistics.tokens


def route_dropless(chosen: Tensor, weight: Tensor, experts: int, kernels: str = "auto") -> Routing:
    """Give every token to all the experts that it chose.

    Args:
        chosen: (tokens, top_k) int64: experts of each token, best first.
        weight: (tokens, top_k).
        experts: how many there are.
        kernels: back end, as in ``run.kernels``.
    """
    order = sort_by_expert(chosen, experts, backend=kernels)
    return _routing(order, weight, None)


def route_by_capacity(chosen: Tensor, weight: Tensor, experts: int, capacity: int, kernels: str = "auto") -> Routing:
    """Fill ``capacity`` slots of each expert by order of position, all first choices before second ones.

    Args:
        chosen: (tokens, top_k) int64: experts of each token, best first.
        weight: (tokens, top_k).
        experts: how many there are.
        capacity: slots of each expert. One that stays empty has weight 0 and the number of some token.
        kernels: back end, as in ``run.kernels``.
    """
    order = sort_by_expert(chosen, experts, capacity, backend=kernels)
    return _routing(order, weight, capacity)


def _routing(order: Order, weight: Tensor, capacity: int | None) -> Routing:
    """Lay out the weights (tokens, top_k) as the rows are; what is dropped goes to one row more."""
    rows = len(order.token)
    place = torch.where(order.slot < 0, rows, order.slot).view(-1)
    weight = weight.new_zeros(rows + 1).scatter(0, place, weight.reshape(-1))[:rows]
    return Routing(order.token, weight, order.slot, order.counts, order.assigned, order.dropped, capacity)


def route_expert_choice(scores: Tensor, sequences: Sequences, capacity: int) -> Routing:
    """Let every expert take the ``capacity`` tokens of each sequence with the highest scores, (tokens, experts)."""
    batch, length, experts = sequences.batch, sequences.length, scores.shape[1]
    weight, place = scores.view(batch, length, experts).permute(2, 0, 1).topk(capacity)  # (experts, batch, capacity)
    token = (place + length * torch.arange(batch, device=place.device)[:, None]).reshape(-1)
    row = torch.arange(len(token), device=token.device)
    slot = token.new_full((sequences.tokens * experts,), -1)
    slot = slot.scatter_(0, token * experts + row // (batch * capacity), row).view(-1, experts)
    counts = torch.full((experts,), batch * capacity, device=token.device)
    dropped = (slot < 0).all(1).sum()
    return Routing(token, weight.reshape(-1), slot, counts, counts, dropped, batch * capacity)


class Router(nn.Module):
    """A bias-free linear map to one logit an expert, in its weight's dtype: fp32, whatever the model computes in.

    Args:
        width: of its input.
        moe: how it routes.
        kernels: back end, as in ``run.kernels``.

    Attributes:
        reduce: turns this rank's part of the logits' sums into the logits; a layout that shards the router's input puts
            another function in the place of this one.
        ranks: how many route the same tokens; each answers for its share of them in the statistics.
    """

    balance_bias: Tensor

    def __init__(self, width: int, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = moe
        self.kernels = kernels
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        self.ranks = 1
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        if moe.balance == "bias":
            self.register_buffer("balance_bias", torch.zeros(moe.experts))
        self.fp32_names = ("weight", "balance_bias") if moe.balance == "bias" else ("weight",)

    @property
    def experts_per_token(self) -> float:
        """How many experts work on a token, on average, where none is dropped."""
        moe = self.config
        if moe.router != "expert_choice":
            return moe.top_k
        assert moe.capacity_factor is not None, "expert choice without a capacity is refused by the config"
        return min(moe.capacity_factor * moe.top_k, moe.experts)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters and buffers start."""
        weight = {"weight": truncated_normal(self.weight.shape[1])}
        return weight | {"balance_bias": zeros} if self.config.balance == "bias" else weight

    def forward(self, x: Tensor, sequences: Sequences) -> tuple[Routing, RouterStatistics]:
        """Route ``x`` (tokens, width)."""
        logits = self.logits(x)
        if sequences.recording.router_logits is not None:
            sequences.recording.router_logits.append(logits)
        if self.config.scores == "softmax":
            scores = share = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            share = scores / scores.sum(-1, keepdim=True)
        if self.config.router == "expert_choice":
            capacity = self._capacity(sequences.length)
            assert capacity is not None, "expert choice without a capacity is refused by the config"
            routing = route_expert_choice(scores, sequences, capacity)
        else:
            routing = self._route(*self._choose(scores))
        statistics = RouterStatistics(
            probability=share.sum(0),
            assigned=routing.assigned.to(share.dtype),
            dropped=routing.dropped.to(share.dtype),
            z=logits.logsumexp(-1).square().sum(),
            entropy=torch.special.entr(share.detach()).sum(),
            tokens=torch.full((), len(x), dtype=share.dtype, device=x.device),
        )
        return routing, statistics if self.ranks == 1 else statistics.divided_by(self.ranks)

    @without_autocast
    def logits(self, x: Tensor) -> Tensor:
        """One logit an expert for each token of ``x`` (tokens, width), (tokens, experts)."""
        return self.reduce(functional.linear(x.to(self.weight.dtype), self.weight))

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, best first, and their weights, both (tokens, top_k).

        The balancing bias (DeepSeek-V3, section 2.1.2) moves only the choice, never a weight.
        """
        ranking = scores.detach()
        if self.config.balance == "bias":
            ranking = ranking + self.balance_bias
        chosen = ranking.topk(self.config.top_k).indices
        weight = scores.gather(1, chosen)
        if self.config.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return chosen, weight

    def _route(self, chosen: Tensor, weight: Tensor) -> Routing:
        capacity = self._capacity(len(chosen))
        if capacity is None:
            return route_dropless(chosen, weight, self.config.experts, self.kernels)
        return route_by_capacity(chosen, weight, self.config.experts, capacity, self.kernels)

    def _capacity(self, tokens: int) -> int | None:
        """Slots an expert has for ``tokens`` tokens; None: as many as needed (evaluation, unless told otherwise)."""
        factor = self.config.capacity_factor
        if not self.training and (self.config.router != "expert_choice" or self.config.evaluation_capacity):
            factor = self.config.evaluation_capacity
        if factor is None:
            return None
        return slots(factor, self.config, tokens)


def slots(factor: float, moe: MoEConfig, tokens: int) -> int:
    """Of an expert, of ``tokens`` tokens that are routed together."""
    return min(max(math.floor(factor * moe.top_k * tokens / moe.experts), 1), tokens)


def capacity_of(moe: MoEConfig, tokens: int) -> int | None:
    """Slots of an expert in training; None: as many as needed."""
    return None if moe.capacity_factor is None else slots(moe.capacity_factor, moe, tokens)


def unchanged(tensor: Tensor) -> Tensor:
    """What stands where some layouts put a collective."""
    return tensor


@torch.no_grad()
def update_balance_bias(router: Router, assigned: Tensor, rate: float | Tensor) -> None:
    """Raise the bias of experts with less than the mean load, lower the others' (DeepSeek-V3, section 2.1.2).

    Args:
        router: one with ``moe.balance=bias``.
        assigned: (experts,) assignments in the last update's batch, over all ranks.
        rate: by how much; a tensor () where the device decides it.
    """
    router.balance_bias += rate * torch.sign(assigned.mean() - assigned)
