"""A layer of the residual stack, and the pass through all of them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers.base import Mixer, State, Statistics
from moe_mamba.model.norm import build_norm
from moe_mamba.model.pattern import LayerSpec, layer_specs
from moe_mamba.model.sequences import Sequences


class Layer(nn.Module):
    """Norm and mixer. What the mixer adds to the residual stream is added by the next norm, in one pass with it."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        (mixer,) = spec.mixers
        self.norm = build_norm(config, kernels)
        self.mixer = mixer.build(config, moe, kernels)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What reads the layer's normalised input."""
        return (self.mixer,)

    def forward(
        self, stream: Tensor, update: Tensor | None, sequences: Sequences, state: State | None = None
    ) -> tuple[Tensor, Tensor, Statistics, State | None]:
        """Mix ``stream`` + ``update``, both (tokens, d_model); returns (that sum, update, statistics, new state)."""
        normalised, stream = self.norm(stream, update)
        update, statistics, state = self.mixer(normalised, sequences, state)
        return stream, update, {f"mixer.{name}": measured for name, measured in statistics.items()}, state


def build_layers(config: ModelConfig, moe: MoEConfig, kernels: str) -> nn.ModuleList:
    """Build the layers that the pattern names."""
    return nn.ModuleList(Layer(spec, config, moe, kernels) for spec in layer_specs(config))


def run_layers(
    layers: Iterable[Callable],
    stream: Tensor,
    sequences: Sequences,
    states: Sequence[State | None] | None = None,
    recompute: bool = False,
    merge: bool = False,
) -> tuple[Tensor, Statistics, list[State | None] | None]:
    """Run the layers over embedded tokens.

    Args:
        layers: ``Layer`` modules.
        stream: (tokens, d_model).
        sequences: how the tokens are divided into sequences, and what of the pass is recorded.
        states: of each layer, from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
        recompute: keep only each layer's input, and compute the rest again in the backward pass; without states.
        merge: hand one tensor from layer to layer in the place of a stream and its update, as who keeps it wants.

    Returns:
        The stream after the last layer (tokens, d_model), the statistics of each router by its full name
        (``layers.1.mixer.router``), and the new states.
    """
    update: Tensor | None = None  # of the last layer, not yet in the stream
    statistics: Statistics = {}
    new_states: list[State | None] = []
    streams = sequences.recording.streams
    for index, layer in enumerate(layers):
        if streams is not None or recompute or merge:  # the sum: recorded, or the one tensor that is kept per layer
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
        statistics.update({f"layers.{index}.{name}": router for name, router in measured.items()})
    return _sum(stream, update), statistics, new_states if states is not None else None


def initial_states(
    layers: Iterable[nn.Module], batch: int, dtype: torch.dtype, device: torch.device, room: int | None = None
) -> list[State | None]:
    """Each layer's state before any token.

    Args:
        layers: ``Layer`` modules.
        batch: sequences.
        dtype: of the activations; what a scan keeps is fp32 at least.
        device: of the states.
        room: tokens that may come; None: any number, and attention's states grow.
    """
    return [layer.mixer.initial_state(batch, dtype, device, room) for layer in layers]  # type: ignore[union-attr,operator]


def fp32_parameter_names(model: nn.Module) -> set[str]:
    """Parameters, and balance biases, that stay fp32 in a bf16 model: what each module declares of its own."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "fp32_names", ())
    }


def _sum(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update
