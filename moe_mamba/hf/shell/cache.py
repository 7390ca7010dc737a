"""What layers keep between passes, as Transformers hands it on."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from transformers import Cache

from moe_mamba.model.attention import AttentionState
from moe_mamba.model.language_model import State
from moe_mamba.model.mamba import MambaState
from moe_mamba.model.sequences import Sequences


class MoEMambaCache(Cache):
    """What the layers keep between passes: Mamba's states of constant size, keys and values of attention alone.

    A new one is empty, and fits any batch. A pass changes it in place and returns it.

    Attributes:
        states: one for each layer, None for feed-forward layers and experts; empty before the first pass.
        length: tokens seen, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.length = 0

    def __len__(self) -> int:
        """How many layers it has states of, those that keep nothing included."""
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.states)}, length={self.length})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included; the same for every layer."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, as the tokens that may come are not limited."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token was seen."""
        return self.length > 0

    @property
    def batch_size(self) -> int:
        """Sequences that it has states of; -1 where it cannot say."""
        tensors = self.tensors()
        return tensors[0].shape[0] if tensors else -1

    @property
    def is_croppable(self) -> bool:
        """No: a state cannot forget its last tokens."""
        return False

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [getattr(state, field.name) for state in self.states if state is not None for field in fields(state)]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.length = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: see ``is_croppable``.

        Raises:
            ValueError: always.
        """
        raise ValueError("MoEMambaCache.crop: a state cannot forget its last tokens; keep a copy.deepcopy from before")

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
        self.states = [state if state is None else map_state(state, function) for state in self.states]


def map_state(state: MambaState | AttentionState, function: Callable[[Tensor], Tensor]) -> Any:
    """A layer's state with every tensor changed."""
    return type(state)(**{field.name: function(getattr(state, field.name)) for field in fields(state)})


def _state_to(state: MambaState | AttentionState, device: Any, non_blocking: bool = False) -> Any:
    return map_state(state, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def _sequences_to(sequences: Sequences, device: Any, non_blocking: bool = False) -> Sequences:
    starts = sequences.starts
    return sequences if starts is None else replace(sequences, starts=starts.to(device, non_blocking=non_blocking))


# With a device map accelerate brings a layer's inputs to the layer's device: tensors, and what has a method `to`.
for _class, _to in ((MambaState, _state_to), (AttentionState, _state_to), (Sequences, _sequences_to)):
    setattr(_class, "to", _to)  # noqa: B010
