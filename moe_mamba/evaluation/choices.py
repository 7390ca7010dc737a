"""Which experts take which tokens of a text, as a model's routers decide in evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_mamba.data.batch import UNCOUNTED
from moe_mamba.data.loader import evaluation_batches
from moe_mamba.data.source import Source
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import Router, Routing
from moe_mamba.run.metrics import router_label

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """What the models read: whole windows, one after the other.

    Attributes:
        ids: (tokens,) ids of the tokens.
        position: (tokens,) place of each in its document, from 0; a document goes on from window to window.
        windows: how many.
    """

    ids: Numbers
    position: Numbers
    windows: int


@dataclass(frozen=True)
class Choices:
    """What one router did with a text.

    Attributes:
        token: (assignments,) place in the text of each token that an expert took; with several experts a token, it
            stands there several times.
        expert: (assignments,) that expert.
        first: (tokens,) of the experts that took a token the one with the largest weight; -1: none did.
        experts: how many there are.
        looks_ahead: whether experts choose tokens, among later ones, too.
    """

    token: Numbers
    expert: Numbers
    first: Numbers
    experts: int
    looks_ahead: bool


def choices_of(
    model: LanguageModel, source: Source, length: int, batch: int, most: int, end_of_text: int, reset: bool
) -> tuple[Text, dict[str, Choices]]:
    """Let a model read a text, and keep what its routers do; evaluation's routing, so without dropped tokens.

    Args:
        model: all of it, on this device.
        source: the text.
        length: tokens per window.
        batch: windows at once.
        most: windows to read.
        end_of_text: id of that token.
        reset: whether the model's state begins anew with each document, as in its training.

    Returns:
        The text, and the choices of each router by its label in metrics, in the model's order.

    Raises:
        UserError: the source is no text, or has not one whole window.
    """
    routers = model.routers()
    if not source.is_text:
        raise UserError(f"{source.name} is no text: give one with --input")
    ids: list[Numbers] = []
    ends: list[NDArray[np.bool_]] = []
    taken = {name: _Taken() for name in routers}
    device = model.embedding.weight.device
    batches = evaluation_batches(source, length, batch, end_of_text, reset)
    model.eval()
    with torch.no_grad(), _watched(routers, taken):
        for windows, made in zip(source.validation_windows(length, batch), batches, strict=True):
            whole = (windows.tokens != UNCOUNTED).all(1)
            whole[most - len(ids) :] = False
            if not whole.any():
                break
            rows = torch.from_numpy(whole)
            starts = None if made.document_starts is None else made.document_starts[rows].to(device)
            model.hidden(made.tokens[rows].to(device), starts)
            ids += list(windows.tokens[whole])
            marked = windows.tokens == end_of_text
            ends += list((marked if windows.ends is None else marked | windows.ends)[whole])
    if not ids:
        raise UserError(
            f"the text has not one whole window of {length} tokens: lower --sequence_length, or give more --input"
        )
    text = Text(np.concatenate(ids), _positions(np.concatenate(ends)), len(ids))
    return text, {router_label(name): taken[name].choices(router, len(text.ids)) for name, router in routers.items()}


def _positions(ends: NDArray[np.bool_]) -> Numbers:
    """Place of each token in its document, where ``ends`` (tokens,) is True at a document's last token."""
    place = np.arange(len(ends))
    starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
    return place - starts[np.searchsorted(starts, place, side="right") - 1]


@contextmanager
def _watched(routers: dict[str, Router], taken: "dict[str, _Taken]") -> Iterator[None]:
    """Keep the decision of each pass of each router."""
    hooks = [router.register_forward_hook(taken[name].add) for name, router in routers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Taken:
    """What one router decided, pass by pass."""

    def __init__(self) -> None:
        self._tokens = 0
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, _: Router, __: Any, output: tuple[Routing, Any]) -> None:
        """Keep token, expert and weight of each assignment: a hook on the router's forward pass."""
        routing = output[0]
        token, expert, weight = assignments(routing)
        self._passes.append((token.cpu() + self._tokens, expert.cpu(), weight.float().cpu()))
        self._tokens += len(routing.slot)

    def choices(self, router: Router, tokens: int) -> Choices:
        """All passes together."""
        assert self._tokens == tokens, "each token passes each router once"
        token, expert, weight = (torch.cat(parts).numpy() for parts in zip(*self._passes, strict=True))
        first = np.full(tokens, -1)
        order = np.argsort(weight, kind="stable")
        first[token[order]] = expert[order]  # what stands last stays: the largest weight
        config = router.config
        return Choices(token, expert, first, config.experts, config.router == "expert_choice")


def assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and weight of each row that is no empty slot, (assignments,) each, in the order of tokens."""
    taken = routing.slot >= 0
    token, row = taken.nonzero()[:, 0], routing.slot[taken]
    expert = torch.searchsorted(routing.counts.cumsum(0), row, right=True)  # rows are sorted by expert
    return token, expert, routing.weight[row]
