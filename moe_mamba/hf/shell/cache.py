"""What layers keep between passes, as Transformers hands it on."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moe_mamba.model.mixers.base import State

CACHE = "cache" if "cache" in {field.name for field in fields(MoeCausalLMOutputWithPast)} else "past_key_values"
"""What this version of Transformers calls a cache: ``cache`` since 5.24, ``past_key_values`` before."""


class StateCache(Cache):
    """What the layers keep between passes: Mamba's states of constant size, and attention's keys and values.

    Attributes:
        states: one for each layer, None for feed-forward layers and experts; empty before the first pass.
        seen: tokens seen, padding included.
        visible: (batch, tokens) bool, which of them were no padding; None: all were text.
        max_cache_len: tokens that it has room for; None: any number.
    """

    max_cache_len: int | None = None
    is_compileable = False
    is_croppable = False  # a state cannot forget its last tokens
    is_linear: Any = (False,)  # all([]) is True, and Transformers then reads again what was seen

    def __init__(self) -> None:
        Cache.__init__(self, layers=[])
        self.states: list[State | None] = []
        self.seen: Any = 0
        self.visible: Tensor | None = None

    def __len__(self) -> int:
        """How many mixers it has states of, those that keep nothing included; in most models each is a layer."""
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.states)}, tokens={int(self.seen)})"

    @property
    def is_empty(self) -> bool:
        """Whether no token was seen."""
        return self.seen == 0

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, padding included; the same for every layer."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that it has room for; -1 where they are not limited."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token was seen."""
        return not self.is_empty

    @property
    def batch_size(self) -> int:
        """Sequences that it has states of; -1 where it cannot say."""
        rows = [tensor.shape[0] for tensor in self.tensors() if tensor.dim()]
        return rows[0] if rows else -1

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        values = [getattr(state, field.name) for state in self.states if state is not None for field in fields(state)]
        return [value for value in values if value is not None]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen, self.visible = [], 0, None

    def crop(self, *tokens: int) -> None:
        """Refuse: see ``is_croppable``.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}.crop: a state cannot forget its last tokens; keep a copy.deepcopy from before"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of the beams that live on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the states of these rows of the batch."""
        self._change(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, copies side by side."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.keep([state and state.map_rows(function) for state in self.states])
        if self.visible is not None:
            self.visible = function(self.visible)

    def keep(self, states: list[State | None]) -> None:
        """Take a pass's new states."""
        self.states = states

    def count(self, batch: int, length: int, visible: Tensor | None) -> None:
        """Count new tokens; ``visible`` (batch, length) bool says which are text, None: all."""
        if visible is not None or self.visible is not None:
            device = (self.visible if visible is None else visible).device  # type: ignore[union-attr]
            if self.visible is None:
                self.visible = torch.ones(batch, self.seen, dtype=torch.bool, device=device)
            if visible is None:
                visible = torch.ones(batch, length, dtype=torch.bool, device=device)
            self.visible = torch.cat((self.visible, visible), dim=1)
        self.seen += length


class MoEMambaCache(StateCache, DynamicCache):
    """A cache for any number of tokens. A new one is empty, and fits any batch; a pass changes it and returns it."""


class MoEMambaStaticCache(StateCache, StaticCache):
    """A cache with room for a number of tokens, none of whose tensors ever moves or grows: for compiled steps.

    Args:
        max_cache_len: tokens that it has room for.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self._is_empty = True

    @property
    def is_empty(self) -> bool:
        """Whether no token was seen; known without a look at the device."""
        return self._is_empty

    def reset(self) -> None:
        """Forget everything, in place."""
        self.visible, self._is_empty = None, True
        for tensor in (*self.tensors(), *([] if isinstance(self.seen, int) else [self.seen])):
            tensor.zero_()

    def keep(self, states: list[State | None]) -> None:
        """Take new states, in the tensors that it has where they are as large; no gradient flows through them."""
        if self.states:
            self.states = [_written(old, new) for old, new in zip(self.states, states, strict=True)]
        else:
            self.states = [state and state.map(lambda tensor: tensor.detach().clone()) for state in states]

    def count(self, batch: int, length: int, visible: Tensor | None) -> None:
        """Count new tokens; ``visible`` (batch, length) bool says which are text, None: all."""
        if isinstance(self.seen, int):
            device = next(iter(self.tensors()), torch.empty(0)).device
            self.seen = torch.tensor(0, device=device)
            if not torch.compiler.is_compiling():
                for tensor in (self.seen, *self.tensors()):
                    torch._dynamo.mark_static_address(tensor)
        if visible is not None:
            if self.visible is None:
                self.visible = torch.ones(batch, self.max_cache_len or 0, dtype=torch.bool, device=visible.device)
            place = torch.arange(length, device=visible.device) + self.seen.to(visible.device)
            self.visible.index_copy_(1, place, visible)
        self.seen.add_(length)
        self._is_empty = False


def _written(old: State | None, new: State | None) -> State | None:
    """``new``, in the tensors of ``old`` where they are as large."""
    if old is None or new is None:
        return new

    def write(target: Tensor | None, value: Tensor | None) -> Tensor | None:
        if target is None or value is None or target is value or target.shape != value.shape:
            return value
        return target.copy_(value.detach())

    values: dict[str, Any] = {
        field.name: write(getattr(old, field.name), getattr(new, field.name)) for field in fields(new)
    }
    return replace(new, **values)
