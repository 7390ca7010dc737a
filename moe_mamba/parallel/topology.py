"""Which processes there are, which device each drives, and how they share the model and its data.

Only arithmetic of ranks, so that any rank of any layout can be looked at from one process; the process groups that
follow from it are in groups.py.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.model.pattern import looks_ahead
from moe_mamba.parallel.launcher import fill_environment


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` and `size` count over all machines, `local_rank` over this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> "World":
        """Read what the launcher set, whichever it was, and fill in the variables that it left out.

        Args:
            local_rank: what a launcher's flag `--local_rank` says, if there is one.

        Raises:
            LocalError: the environment is impossible, or contradicts itself.
        """
        launch = fill_environment(local_rank)
        return cls(launch.rank, launch.size, launch.local_rank, launch.local_size)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def check_devices(self) -> None:
        """Refuse more processes than GPUs.

        Raises:
            UserError: this process has no device.
        """
        if torch.cuda.is_available() and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} processes, but this machine has {torch.cuda.device_count()} GPUs: "
                f"start one per GPU, with --num_gpus={torch.cuda.device_count()}"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0


@dataclass(frozen=True)
class Topology:
    """How `world` is laid out: size = tensor x data, and experts over any divisor of it. Only arithmetic of ranks.

    Tensor-parallel ranks are neighbours, since they talk most, over the fastest links: rank = data_rank x tensor +
    tensor_rank. Expert-parallel ranks are neighbours too, tensor-parallel ranks among them, each with its own tokens;
    where experts are sharded by tensor (`expert_tensor`), they are the neighbours among the ranks of one tensor_rank.
    """

    world: World
    tensor: int = 1
    expert: int = 1
    expert_tensor: bool = False

    @classmethod
    def of(cls, config: Config, world: World) -> "Topology":
        """The layout that `config` asks for.

        Raises:
            UserError: the sizes do not fit one another or the batch; names them, and a layout that would. Whether they
                fit the model, ``placement.check_shards`` knows.
        """
        parallel = config.parallel
        topology = cls(world, parallel.tensor, parallel.expert, parallel.expert_tensor)
        topology._check_sizes(config)
        topology._check_batch(config)
        return topology

    def resized(self, group: Literal["tensor", "expert"], size: int) -> "Topology":
        """The same with another size of one kind of group."""
        return replace(self, tensor=size) if group == "tensor" else replace(self, expert=size)

    def fits(self, config: Config) -> bool:
        """Whether the sizes fit one another and the batch."""
        size, train, multiple = self.world.size, config.train, self.micro_batch_multiple(config)
        experts_over = self.data if self.expert_tensor else size
        if size % self.tensor or experts_over % self.expert or (self.expert_tensor and self.tensor == 1):
            return False
        share, rest = divmod(train.global_batch, self.data)
        return not (rest or share % multiple or share % (train.micro_batch or 1) or (train.micro_batch or 0) % multiple)

    @property
    def data(self) -> int:
        """Groups of tensor-parallel ranks; each reads other text."""
        return self.world.size // self.tensor

    @property
    def data_rank(self) -> int:
        """Which text this process reads."""
        return self.world.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which part of each layer this process holds."""
        return self.world.rank % self.tensor

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this process holds."""
        return (self.data_rank if self.expert_tensor else self.world.rank) % self.expert

    @property
    def inner_expert(self) -> int:
        """Ranks that share the experts inside mixers, each with the same channels: ``expert`` counts all channels'."""
        return self.expert if self.expert_tensor else self.expert // math.gcd(self.expert, self.tensor)

    @property
    def inner_expert_rank(self) -> int:
        """Which part of the experts inside mixers this process holds."""
        return self.data_rank % self.inner_expert

    @property
    def is_sharded(self) -> bool:
        """Whether no single process holds a whole model."""
        return self.tensor > 1 or self.expert > 1

    @property
    def experts_span_data(self) -> bool:
        """Whether ranks that read other text hold each other's experts, and so must pass together."""
        return self.expert > 1 if self.expert_tensor else self.tensor % self.expert != 0

    def sequences_per_data_rank(self, global_batch: int, micro_batch: int | None) -> int:
        """Sequences of a global batch that fall to each group of tensor-parallel ranks.

        Raises:
            UserError: the global batch cannot be shared evenly, or a share not divided into micro-batches.
        """
        groups = (
            f"{self.data} groups of {self.tensor} tensor-parallel ranks"
            if self.tensor > 1
            else f"{self.data} processes"
        )
        if global_batch % self.data:
            least = self.data * (micro_batch or 1)
            unit = self.expert if self.expert_tensor else math.lcm(self.expert, self.tensor) // self.tensor
            fitting = max(
                (n for n in range(unit, self.data, unit) if global_batch % (n * (micro_batch or 1)) == 0), default=None
            )
            fewer = f", or start {fitting * self.tensor} processes" if fitting else ""
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by the {groups}: "
                f"set train.global_batch={-(-global_batch // least) * least}{fewer}"
            )
        share = global_batch // self.data
        if micro_batch and share % micro_batch:
            raise UserError(
                f"train.micro_batch={micro_batch} does not divide the {share} sequences of each of the {groups} "
                f"(train.global_batch={global_batch}): set train.micro_batch={math.gcd(share, micro_batch)}"
            )
        return share

    def _check_sizes(self, config: Config) -> None:
        size = self.world.size
        if size % self.tensor:
            raise UserError(
                f"parallel.tensor={self.tensor} does not divide the number of processes, {size}: "
                f"{self._fix(config, 'tensor')}"
            )
        experts_over, kind = (
            (self.data, "groups of tensor-parallel ranks") if self.expert_tensor else (size, "processes")
        )
        if experts_over % self.expert:
            raise UserError(
                f"parallel.expert={self.expert} does not divide the number of {kind}, {experts_over}: "
                f"{self._fix(config, 'expert')}"
            )

    def _fix(self, config: Config, key: Literal["tensor", "expert"]) -> str:
        """Say the nearest smaller size with which all fits, and the nearest number of processes for the one asked."""
        size, asked = self.world.size, getattr(self, key)
        sizes = (n for n in range(asked - 1, 0, -1) if asked % n == 0 and self.resized(key, n).fits(config))
        worlds = sorted(range(1, size + 2 * self.tensor * self.expert), key=lambda n: abs(n - size))
        counts = (n for n in worlds if replace(self, world=replace(self.world, size=n)).fits(config))
        ways = [f"set parallel.{key}={n}" for n in sizes][:1] + [f"start {n} processes" for n in counts][:1]
        return " or ".join(ways) or f"change parallel.{key}, train.global_batch or train.micro_batch"

    def micro_batch_multiple(self, config: Config) -> int:
        """What a micro-batch is a multiple of: tensor-parallel ranks share tokens; with expert choice, sequences."""
        if looks_ahead(config.model, config.moe) and not self.expert_tensor:
            return self.tensor
        return self.tensor // math.gcd(self.tensor, config.data.sequence_length)

    def _check_batch(self, config: Config) -> None:
        multiple, train = self.micro_batch_multiple(config), config.train
        if train.global_batch % self.data == 0 and train.global_batch // self.data % multiple:
            unit = self.data * math.lcm(multiple, train.micro_batch or 1)
            raise UserError(
                f"train.global_batch={train.global_batch} gives {train.global_batch // self.data} sequences of "
                f"{config.data.sequence_length} tokens to each group of parallel.tensor={self.tensor} ranks, which "
                f"cannot share them: set train.global_batch={-(-train.global_batch // unit) * unit}"
            )
        share = self.sequences_per_data_rank(train.global_batch, train.micro_batch)
        if train.micro_batch and train.micro_batch % multiple:
            fitting = max(n for n in range(multiple, share + 1, multiple) if share % n == 0)
            raise UserError(
                f"train.micro_batch={train.micro_batch} sequences of {config.data.sequence_length} tokens cannot be "
                f"shared by parallel.tensor={self.tensor} ranks: set train.micro_batch={fitting}"
            )


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    named = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"rank{'s' * (len(ranks) > 1)} {named}"
