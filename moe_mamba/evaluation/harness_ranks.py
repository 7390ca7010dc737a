"""EleutherAI's harness on several ranks: rank 0 runs it, and all ranks answer what it asks. Needs the package lm-eval.

So tasks, their data and their code are needed on rank 0 alone, and no rank asks in another order than the others.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_mamba.errors import UserError
from moe_mamba.evaluation.harness import HarnessModel, Score, T
from moe_mamba.parallel.distributed import from_all, from_first
from moe_mamba.run.restore import Restored


class ShardedHarnessModel(HarnessModel):
    """As ``HarnessModel``, of this rank's part of a model; the harness asks rank 0's.

    What is to be written is shared among the data-parallel ranks. So is what is to be scored, but for experts that lie
    on several of these ranks: they must pass together, and all of them score all of it.
    """

    def __init__(self, restored: Restored, *, batch: int, max_length: int) -> None:
        super().__init__(restored, batch=batch, max_length=max_length)
        self._is_first = restored.topology.world.is_first
        if not self._is_first:
            self._screen = io.StringIO()  # one bar is enough

    def lead(self, ask: Callable[[], T]) -> T | None:
        """Let rank 0 run the harness, as ``ask`` does, and the others answer until it is done; every rank calls it.

        Returns:
            What ``ask`` gives, on rank 0; else None.

        Raises:
            UserError: of ``ask``, on every rank.
        """
        if not self._is_first:
            self._answer()
            return None
        try:
            result = ask()
        except UserError as error:
            from_first(str(error))
            raise
        from_first("")
        return result

    def _answer(self) -> None:
        """Do what rank 0 is asked; a text instead is the end, and says why, if it is not empty."""
        while not isinstance(asked := from_first(None), str):
            assert asked is not None
            method, arguments = asked
            with contextlib.suppress(UserError):  # rank 0 has it too, and says so
                getattr(self, method)(*arguments)
        if asked:
            raise UserError(asked)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Score]:
        """See ``HarnessModel``."""
        if self._is_first:
            requests = [("", context, continuation) for _, context, continuation in requests]
            from_first(("_loglikelihood_tokens", (requests,)))
        topology, truncated = self._topology, self.truncated
        if topology.experts_span_data:
            return super()._loglikelihood_tokens(requests)
        # Neighbours, which may share a context, stay together.
        bounds = [len(requests) * rank // topology.data for rank in range(topology.data + 1)]
        mine = requests[bounds[topology.data_rank] : bounds[topology.data_rank + 1]]
        scores = super()._loglikelihood_tokens(mine)
        parts = from_all((scores, self.truncated - truncated))[:: topology.tensor]
        self.truncated = truncated + sum(count for _, count in parts)
        return [score for part, _ in parts for score in part]

    def _write(self, prompts: list[list[int]], settings: Mapping[str, Any], seed: int) -> list[str]:
        """See ``HarnessModel``."""
        if self._is_first:
            from_first(("_write", (prompts, dict(settings), seed)))
        return super()._write(prompts, settings, seed)


def harness_model(restored: Restored, *, batch: int, max_length: int) -> HarnessModel:
    """What the harness asks, on one rank or many; see both classes."""
    kind = HarnessModel if restored.topology.world.size == 1 else ShardedHarnessModel
    return kind(restored, batch=batch, max_length=max_length)
