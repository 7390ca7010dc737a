"""The sizes that routing makes in a step whose data does not exist: rows between ranks, taken from a load."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import Routing
from moe_mamba.parallel.expert import ExpertDispatcher
from moe_mamba.planning.load import Load, Travel

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

    def give(self, model: LanguageModel, is_compiled: bool = False) -> None:
        """Let every dispatcher of a model ask here; a compiled layer breaks there, as it does where it reads sizes."""
        routers = model.routers()
        for name, module in model.named_modules():
            dispatcher = getattr(module, "dispatcher", None)
            if isinstance(dispatcher, ExpertDispatcher):
                # A mixer's routers decide one after the other in every pass, in this order.
                own = itertools.cycle([router for router in routers if router.startswith(f"{name}.")])
                read = partial(self._read, own, dispatcher)
                dispatcher.read_sizes = torch.compiler.disable(read) if is_compiled else read  # type: ignore[method-assign]

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
