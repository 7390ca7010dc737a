"""What a mixer is, and what it declares: all that others ask about a kind of layer, so that nobody else knows it.

A new kind is one file with one subclass, and its line in the registry (``model/mixers/__init__.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers.routing import RouterStatistics
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import Sent, Share, Work

Statistics = dict[str, RouterStatistics]
"""Name of a router inside the module that is asked -> what it measured."""


@dataclass(frozen=True)
class State:
    """What a mixer keeps between passes: a dataclass of tensors; those with axes have a row for each sequence first."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The state with every tensor changed."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: None if value is None else function(value) for name, value in values.items()}
        return replace(self, **changed)

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The state with every tensor changed that has a row for each sequence of the batch."""
        return self.map(lambda tensor: function(tensor) if tensor.dim() else tensor)

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        """The state on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def kept_where(self, waits: Tensor, new: Any, tokens: int) -> Any:
        """The state after a pass over ``tokens`` tokens per row, but as it was for the rows that wait (batch,) bool."""
        pairs = {name: (getattr(self, name), value) for name, value in vars(new).items()}
        kept: dict[str, Any] = {name: choose_rows(waits, old, now.to(old.dtype)) for name, (old, now) in pairs.items()}
        return replace(new, **kept)


def choose_rows(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of ``one`` where ``rows`` (batch,) bool says so, else of ``other``; both (batch, ...)."""
    return torch.where(rows.view(-1, *[1] * (other.dim() - 1)), one, other)


class Mixer(nn.Module):
    """The part of a layer that mixes tokens or channels; a layer adds its norm and the residual stream.

    Attributes:
        letter: its letter in ``model.pattern``.
        title: its name for people.
        settings: keys of the configuration that say how it is built, as people want to see them.
        fp32_names: own parameters and buffers that stay fp32 in a bf16 model: small, and sensitive to rounding.
        logical_names: an attribute of its own -> what checkpoints and initial weights call it, where that is another
            name; see ``model/names.py``.
        not_matrices: own parameters of two axes that are no matrices: neither decayed nor part of a product.
        gathers_tokens: under tensor parallelism it reads the tokens of all ranks; else each rank's own.
        routes: it has routed experts.
        begins: ``start`` sends tokens on their way, so that others should compute before it ends.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    fp32_names: tuple[str, ...] = ()
    logical_names: ClassVar[Mapping[str, str]] = {}
    not_matrices: ClassVar[tuple[str, ...]] = ()
    gathers_tokens: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    begins: ClassVar[bool] = False

    @classmethod
    def serves(cls, moe: MoEConfig, number: int) -> bool:
        """Whether a variant of a kind of layer takes the place of the ``number``-th such layer, counted from 1."""
        return False

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Mixer":
        """The mixer of a layer; ``kernels``: as ``run.kernels``."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: ModelConfig, moe: MoEConfig) -> None:
        """Refuse a configuration that no such layer can be built from.

        Raises:
            ValueError: one line: the keys, what is wrong, and the fix.
        """

    @classmethod
    def looks_ahead(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """Whether a token's output depends on later tokens, so that the model cannot generate."""
        return False

    @classmethod
    def depends_on_batch(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """Whether, in evaluation, a sequence's output depends on what else is in its batch."""
        return False

    def initial_state(
        self, batch: int, dtype: torch.dtype, device: torch.device | str, room: int | None = None
    ) -> State | None:
        """The state before any token; None: the mixer keeps nothing.

        Args:
            batch: sequences.
            dtype: of the activations.
            device: of the state.
            room: tokens that may come; None: any number.
        """
        return None

    def forward(self, x: Tensor, sequences: Sequences, state: Any = None) -> tuple[Tensor, Statistics, State | None]:
        """Map ``x`` (tokens, d_model); returns (y (tokens, d_model), statistics of its routers, new state)."""
        raise NotImplementedError

    def start(self, x: Tensor, sequences: Sequences, state: Any = None) -> Callable[[], tuple[Any, ...]]:
        """Begin a pass, and return what ends it with what ``forward`` returns.

        In a layer of several mixers all begin before any ends: what travels between devices is on its way meanwhile.
        """
        return partial(self, x, sequences, state)

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """How its parameters are sharded; one that is not named is replicated."""
        return {}

    @classmethod
    def kernel_operations(cls, config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
        """Operations of ``moe_mamba.kernels`` in a training step -> the size that a back end may limit, or 0."""
        return {}

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """Record on ``tape`` what a rank's forward pass makes and keeps of its input ``x``; returns its output.

        Args:
            config: of the model.
            moe: of its experts.
            share: sizes of the rank's part.
            tape: where to record.
            x: this rank's tokens, (tokens / tensor, d_model); those of all tensor-parallel ranks where it joins others.
            joins: whether the layer gathers the tokens and reduces the sums of several mixers, this one among them.
        """
        raise NotImplementedError

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """What a rank computes in a micro-step, of which it has ``share``."""
        raise NotImplementedError

    @classmethod
    def sends(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Sent]:
        """What a rank sends inside the mixer in a micro-step, of which it has ``share``; over groups of any size."""
        return []

    @classmethod
    def crossings(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> int:
        """How often a rank gathers the tokens of all tensor-parallel ranks, and reduce-scatters their sums."""
        return int(cls.gathers_tokens)

    def idle_parameters(self) -> int:
        """Parameters that a token does not meet."""
        return 0

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one token, forward and backward, in sequences of ``length``.

        6 for each weight of a matrix that a token meets: a multiplication and an addition forward, twice that backward.
        """
        weights = self.named_parameters()
        matrices = sum(weight.numel() for name, weight in weights if weight.dim() > 1 and name not in self.not_matrices)
        return 6 * (matrices - self.idle_parameters())
