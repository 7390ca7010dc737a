"""Generation on a layout: texts are dealt to the data-parallel ranks, and every rank knows what all of them draw."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_mamba.errors import UserError
from moe_mamba.model.generation import PADDING, Writing, check_prompts
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.sampling import Sampling
from moe_mamba.parallel.distributed import from_all
from moe_mamba.parallel.topology import Topology

NOTHING, REFUSED = -1, -2  # in the place of a token: the text is over; it cannot be drawn


class ShardedWriting:
    """As ``Writing``, on every rank alike: each data-parallel rank passes its share of the texts.

    Tensor-parallel ranks draw the same tokens: they have the same logits, gathered, and the same generators.

    All ranks read their prompts in as many passes. Where experts lie on several data-parallel ranks, one whose texts
    are over goes on passing a token that nobody sees, because the others need its experts.

    Args:
        model: this rank's part.
        topology: the layout.
        prompts: see ``Writing``, as for the following.
        sampling: how tokens are drawn.
        seeds: of each text's draws.
        options: other arguments of ``Writing``.

    Attributes:
        rows: texts that still grow on any rank, by their place in ``prompts``.

    Raises:
        UserError: as ``Writing``, on every rank.
    """

    def __init__(
        self,
        model: LanguageModel,
        topology: Topology,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        **options: Any,
    ) -> None:
        check_prompts(model, prompts)
        self.rows = list(range(len(prompts)))
        self._model, self._topology = model, topology
        self._mine = self.rows[topology.data_rank :: topology.data]
        self._places = -(-len(prompts) // topology.data)  # of the rank that has most
        stand_ins = self._places - len(self._mine)
        self._writing = Writing(
            model,
            [*(prompts[row] for row in self._mine), *[[PADDING]] * stand_ins],
            sampling,
            [*(seeds[row] for row in self._mine), *[0] * stand_ins],
            length=max(map(len, prompts)),
            **options,
        )

    def step(self) -> dict[int, int]:
        """Draw a token for every text that still grows; every rank calls it.

        Returns:
            See ``Writing.step``: of all texts, on every rank.

        Raises:
            UserError: any rank's logits are NaN or Inf; on every rank.
        """
        if not self.rows:
            return {}
        drawn, refusal = self._draw()
        places = [REFUSED if refusal else drawn.get(place, NOTHING) for place in range(self._places)]
        mine = torch.tensor(places, device=self._topology.world.device)
        gathered = [torch.empty_like(mine) for _ in range(self._topology.world.size)]
        dist.all_gather(gathered, mine)
        found = torch.stack(gathered).tolist()  # (ranks, places)
        if any(REFUSED in row for row in found):
            raise UserError(next(filter(None, from_all(refusal))))
        data, tensor = self._topology.data, self._topology.tensor
        tokens = {row: found[row % data * tensor][row // data] for row in self.rows}
        self.rows = [row for row, token in tokens.items() if token != NOTHING]
        return {row: tokens[row] for row in self.rows}

    def _draw(self) -> tuple[dict[int, int], str | None]:
        """This rank's tokens by place among its texts, or why there are none."""
        if not self._writing.rows:
            if self._topology.experts_span_data:
                self._idle()
            return {}, None
        try:
            drawn = self._writing.step()
        except UserError as error:
            return {}, str(error)
        self._writing.stop(range(len(self._mine), self._places))  # stand-ins have served
        return drawn, None

    @torch.inference_mode()
    def _idle(self) -> None:
        """A pass of one token."""
        self._model.hidden(torch.full((1, 1), PADDING, device=self._topology.world.device))

    def stop(self, rows: Sequence[int]) -> None:
        """Let texts end, on every rank alike."""
        self.rows = [row for row in self.rows if row not in rows]
        self._writing.stop([place for place, row in enumerate(self._mine) if row in rows])


def start_writing(
    model: LanguageModel,
    topology: Topology,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    **options: Any,
) -> Writing | ShardedWriting:
    """The texts that grow from ``prompts``; see both classes."""
    if topology.data == 1:
        return Writing(model, prompts, sampling, seeds, **options)
    return ShardedWriting(model, topology, prompts, sampling, seeds, **options)
