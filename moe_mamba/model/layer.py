"""A layer of the residual stack, and the pass through all of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers.attention import Attention, AttentionState
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba, MambaState
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routing import Router, RouterStatistics
from moe_mamba.model.norm import LayerNorm, RMSNorm, build_norm
from moe_mamba.model.sequences import Sequences

State = MambaState | AttentionState | None
"""What a layer keeps between passes; feed-forward layers and experts keep nothing."""


def build_mixer(letter: str, config: ModelConfig, moe: MoEConfig) -> nn.Module:
    """Build what a letter of the pattern stands for."""
    if letter == "M":
        return Mamba(config)
    if letter == "*":
        return Attention(config)
    if letter == "-":
        return FeedForward(config, bias=config.mlp_bias)
    return MoE(config, moe)


class Layer(nn.Module):
    """Norm and mixer. What the mixer adds to the residual stream is added by the next norm, in one pass with it."""

    def __init__(self, letter: str, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = build_mixer(letter, config, moe)

    def forward(
        self, stream: Tensor, update: Tensor | None, sequences: Sequences, state: State = None
    ) -> tuple[Tensor, Tensor, RouterStatistics | None, State]:
        """Mix ``stream`` + ``update``, both (tokens, d_model); returns (that sum, update, statistics, new state)."""
        normalised, stream = self.norm(stream, update)
        update, statistics, state = self.mixer(normalised, sequences, state)
        return stream, update, statistics, state


def build_layers(config: ModelConfig, moe: MoEConfig) -> nn.ModuleList:
    """Build the layers that the pattern names."""
    return nn.ModuleList(Layer(letter, config, moe) for letter in config.layers)


def run_layers(
    layers: Iterable[Callable],
    stream: Tensor,
    sequences: Sequences,
    states: Sequence[State] | None = None,
    recompute: bool = False,
    merge: bool = False,
) -> tuple[Tensor, list[RouterStatistics], list[State] | None]:
    """Run the layers over embedded tokens.

    Args:
        layers: ``Layer`` modules.
        stream: (tokens, d_model).
        sequences: how the tokens are cut into sequences, and what of the pass is recorded.
        states: of each layer, from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
        recompute: keep only each layer's input, and compute the rest again in the backward pass; without states.
        merge: hand one tensor from layer to layer in the place of a stream and its update, as who keeps it wants.

    Returns:
        The stream after the last layer (tokens, d_model), the statistics of each router, and the new states.
    """
    update: Tensor | None = None  # of the last layer, not yet in the stream
    statistics: list[RouterStatistics] = []
    new_states: list[State] = []
    streams = sequences.recording.streams
    for index, layer in enumerate(layers):
        if streams is not None or recompute or merge:  # the sum: recorded, or the one tensor that is kept a layer
            stream, update = _sum(stream, update), None
        if streams is not None:
            streams.append(stream.view(sequences.batch, sequences.length, -1))
            stream = streams[-1].flatten(0, 1)  # so that what is recorded takes part in the graph
        if recompute:  # nothing in a layer is random, so no random state is kept
            stream, update, measured, _ = checkpoint(
                layer, stream, None, sequences, use_reentrant=False, preserve_rng_state=False
            )
        else:
            state = states[index] if states is not None else None
            stream, update, measured, state = layer(stream, update, sequences, state)
            new_states.append(state)
        if measured is not None:
            statistics.append(measured)
    return _sum(stream, update), statistics, new_states if states is not None else None


def initial_states(
    layers: Iterable[nn.Module], batch: int, dtype: torch.dtype, device: torch.device, room: int | None = None
) -> list[State]:
    """Each layer's state before any token.

    Args:
        layers: ``Layer`` modules.
        batch: sequences.
        dtype: of the activations; what a scan keeps is fp32 at least.
        device: of the states.
        room: tokens that may come; None: any number, and attention's states grow.
    """
    states: list[State] = []
    for layer in layers:
        mixer = layer.mixer
        if isinstance(mixer, Mamba):
            states.append(mixer.initial_state(batch, dtype, device))
        elif isinstance(mixer, Attention):
            states.append(mixer.initial_state(batch, dtype, device, room))
        else:
            states.append(None)
    return states


def map_rows(state: State, function: Callable[[Tensor], Tensor]) -> State:
    """A layer's state with every tensor changed that has a row for each sequence of the batch."""
    if state is None:
        return None
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    rows: dict[str, Any] = {
        name: function(value) for name, value in values.items() if value is not None and value.dim()
    }
    return replace(state, **rows)


def fp32_parameter_names(model: nn.Module) -> set[str]:
    """Parameters, and balance biases, that stay fp32 in a bf16 model: small, and sensitive to rounding."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        local: list[str] = []
        if isinstance(module, RMSNorm | LayerNorm | Router):
            local = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        elif isinstance(module, Mamba):
            local = ["A_log", "D", "dt_proj.bias"] + ["dt_B_C"] * (not module.config.selective)
        names.update(f"{prefix}.{name}" if prefix else name for name in local)
    return names


def _sum(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update
