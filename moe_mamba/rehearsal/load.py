"""The sizes that routing makes in a step whose data does not exist, taken from a load.

Rows between ranks; and those of each expert, where the reference back end of the experts' products reads them.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_mamba.kernels.grouped_matmul import reference
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.dispatch import Dispatch, LocalDispatcher
from moe_mamba.model.mixers.routing import Routing
from moe_mamba.parallel.expert import ExpertDispatcher
from moe_mamba.planning.load import Load, Travel
from moe_mamba.rehearsal.device import replaced

Matrix = list[list[int]]


class Rows:
    """Rows that a rank sends and receives, in the place of what dispatchers read from the device.

    Args:
        load: how tokens spread over experts.
        note_wait: is told that the host waits there, and for what.

    Attributes:
        matrices: router's name -> what each rank of its group sends to each expert.
    """

    def __init__(self, load: Load, note_wait: Callable[[str], None]) -> None:
        self._load, self._note_wait = load, note_wait
        self.matrices: dict[str, Matrix] = {}
        self._counts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # rows of each expert of a dispatch

    def give(self, model: LanguageModel, is_compiled: bool = False) -> None:
        """Let every dispatcher of a model ask here; a compiled layer breaks there, as it does where it reads sizes."""
        routers = model.routers()
        for name, module in model.named_modules():
            dispatcher = getattr(module, "dispatcher", None)
            if not isinstance(dispatcher, LocalDispatcher):
                continue
            # A mixer's routers decide one after the other in every pass, in this order.
            own = [router for router in routers if router.startswith(f"{name}.")]
            if isinstance(dispatcher, ExpertDispatcher):
                read = partial(self._read, itertools.cycle(own), dispatcher)
                dispatcher.read_sizes = torch.compiler.disable(read) if is_compiled else read  # type: ignore[method-assign]
            if dispatcher._kernels == "reference":
                plan = partial(self._plan, itertools.cycle(own), dispatcher.plan)
                dispatcher.plan = torch.compiler.disable(plan) if is_compiled else plan  # type: ignore[method-assign]

    @contextlib.contextmanager
    def answering(self, is_compiled: bool = False) -> Iterator[None]:
        """Let the reference back end of the experts' products ask here while the block lasts."""
        read = torch.compiler.disable(self._read_counts) if is_compiled else self._read_counts
        with replaced(reference, "read_counts", read):
            yield

    def _read(
        self, routers: "itertools.cycle[str]", dispatcher: Any, routing: Routing, received: Tensor
    ) -> tuple[list[int], list[int]]:
        """As ``ExpertDispatcher.read_sizes``."""
        self._note_wait("sizes of an exchange")
        group, router, rows = dispatcher._group, next(routers), len(routing.token)
        matrix = self.matrices.get(router)
        if matrix is None or sum(matrix[0]) != rows:
            matrix = self._load.matrix(group.size(), len(routing.counts), rows, router)
            self.matrices[router] = matrix
        travel = Travel.of(matrix, group.rank())
        return travel.sent_splits, travel.received_splits

    def _plan(self, routers: "itertools.cycle[str]", plan: Callable[[Routing], Dispatch], routing: Routing) -> Dispatch:
        """As a dispatcher's, of which it is noted how many rows its experts have."""
        router, dispatch = next(routers), plan(routing)
        if dispatch.capacity is None:
            travel, experts = dispatch.travel, len(routing.counts)
            if travel is None:
                self._counts[dispatch.counts] = self._load.matrix(1, experts, len(routing.token), router)[0]
            else:
                self._counts[dispatch.counts] = Travel.of(self.matrices[router], travel.group.rank()).counts
        return dispatch

    def _read_counts(self, counts: Tensor) -> list[int]:
        """As the reference back end's."""
        self._note_wait("rows of each expert")
        return self._counts[counts]
