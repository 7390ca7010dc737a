"""The batches of a run, read ahead of its steps."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from moe_mamba.data.batch import Batch
from moe_mamba.data.loader import Loader
from moe_mamba.parallel.topology import Topology


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's part of a batch.

    Attributes:
        number: of the batch, from 1, in the order of the data.
        parts: its micro-batches.
        counted: targets of this part that the loss counts.
    """

    number: int
    parts: list[Batch]
    counted: int

    def to(self, device: torch.device) -> "GlobalBatch":
        """The same on another device."""
        return replace(self, parts=[part.to(device) for part in self.parts])


class Feed:
    """Reads this rank's parts of batches.

    Args:
        loader: of the corpora.
        topology: the layout.
        micro_batch: sequences that a device works on at once.
        micro_steps: of a step.
    """

    def __init__(self, loader: Loader, topology: Topology, micro_batch: int, micro_steps: int) -> None:
        self._loader, self._topology = loader, topology
        self._micro_batch, self._micro_steps = micro_batch, micro_steps

    def ahead(self, numbers: Iterator[int]) -> Generator[GlobalBatch, None, None]:
        """The batches of `numbers`, counted from 1; while one is worked on, a thread reads the next."""
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self._read, next(numbers))
            for following in numbers:
                batch, upcoming = upcoming.result(), reader.submit(self._read, following)
                yield batch

    def _read(self, number: int) -> GlobalBatch:
        """Each micro-step takes the next sequences, whatever the layout that shares them; pinned for a GPU."""
        together = self._micro_batch * self._topology.data
        size = self._micro_steps * together
        first = (number - 1) * size + self._topology.data_rank * self._micro_batch
        starts = range(first, first + size, together)
        device = self._topology.world.device
        parts = [self._loader.batch(start, self._micro_batch).pinned_for(device) for start in starts]
        return GlobalBatch(number, parts, sum(part.counted for part in parts))
