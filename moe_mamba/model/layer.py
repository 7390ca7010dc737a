"""A layer of the residual stack, and the pass through all of them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers.base import Mixer, State, Statistics
from moe_mamba.model.mixers.routing import unchanged
from moe_mamba.model.norm import build_norm
from moe_mamba.model.pattern import LayerSpec, layer_specs
from moe_mamba.model.sequences import Sequences


class ParallelMixers(nn.ModuleList):
    """Mixers that read one input; their outputs are added.

    Attributes:
        gather: gives those mixers that need all ranks' tokens their input.
        reduce: turns the sum of these mixers' outputs into the output of this rank's tokens. A layout that shards
            layers puts other functions in the place of these two, so that what is common to the mixers travels once.
    """

    def __init__(self, mixers: Iterable[Mixer]) -> None:
        super().__init__(mixers)
        self.gather: Callable[[Tensor], Tensor] = unchanged
        self.reduce: Callable[[Tensor], Tensor] = unchanged

    def forward(
        self, x: Tensor, sequences: Sequences, states: Sequence[State | None]
    ) -> tuple[Tensor, Statistics, list[State | None]]:
        """Map ``x`` (tokens, d_model); returns (y, statistics, new states), the latter one a mixer."""
        mixers: list[Mixer] = list(self)  # type: ignore[arg-type]
        whole = self.gather(x) if any(mixer.gathers_tokens for mixer in mixers) else x
        started = [
            mixer.start(whole if mixer.gathers_tokens else x, sequences, state)
            for mixer, state in zip(mixers, states, strict=True)
        ]
        # Those with tokens on their way end last.
        order = sorted(range(len(mixers)), key=lambda place: mixers[place].begins)
        ended = {place: started[place]() for place in order}
        done = [ended[place] for place in range(len(mixers))]
        together = [y for mixer, (y, _, _) in zip(mixers, done, strict=True) if mixer.gathers_tokens]
        outputs = [y for mixer, (y, _, _) in zip(mixers, done, strict=True) if not mixer.gathers_tokens]
        if together:
            outputs.append(self.reduce(_total(together)))
        statistics = {f"{place}.{name}": router for place, one in enumerate(done) for name, router in one[1].items()}
        return _total(outputs), statistics, [state for _, _, state in done]


class Layer(nn.Module):
    """Norm and mixer. What the mixer adds to the residual stream is added by the next norm, in one pass with it."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        built = [mixer.build(config, moe, kernels) for mixer in spec.mixers]
        self.norm = build_norm(config, kernels)
        self.mixer = built[0] if len(built) == 1 else ParallelMixers(built)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What reads the layer's normalised input."""
        return tuple(self.mixer) if isinstance(self.mixer, ParallelMixers) else (self.mixer,)  # type: ignore[arg-type]

    def forward(
        self, stream: Tensor, update: Tensor | None, sequences: Sequences, states: Sequence[State | None]
    ) -> tuple[Tensor, Tensor, Statistics, list[State | None]]:
        """Mix ``stream`` + ``update``, both (tokens, d_model); returns (that sum, update, statistics, new states).

        States, before and after, are one a mixer.
        """
        normalised, stream = self.norm(stream, update)
        if isinstance(self.mixer, ParallelMixers):
            update, statistics, new_states = self.mixer(normalised, sequences, states)
        else:
            update, statistics, new_state = self.mixer(normalised, sequences, states[0])
            new_states = [new_state]
        return stream, update, {f"mixer.{name}": measured for name, measured in statistics.items()}, new_states


def build_layers(config: ModelConfig, moe: MoEConfig, kernels: str) -> nn.ModuleList:
    """Build the layers that the pattern names."""
    return nn.ModuleList(Layer(spec, config, moe, kernels) for spec in layer_specs(config, moe))


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
        states: of each mixer, from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
        recompute: keep only each layer's input, and compute the rest again in the backward pass; without states.
        merge: hand one tensor from layer to layer in the place of a stream and its update, as who keeps it wants.

    Returns:
        The stream after the last layer (tokens, d_model), the statistics of each router by its full name
        (``layers.1.mixer.router``), and the new states.
    """
    update: Tensor | None = None  # of the last layer, not yet in the stream
    statistics: Statistics = {}
    new_states: list[State | None] = []
    streams, left = sequences.recording.streams, iter(states or ())
    for index, layer in enumerate(layers):
        count = len(layer.mixers)  # type: ignore[attr-defined]
        if streams is not None or recompute or merge:  # the sum: recorded, or the one tensor that is kept per layer
            stream, update = _sum(stream, update), None
        if streams is not None:
            streams.append(stream.view(sequences.batch, sequences.length, -1))
            stream = streams[-1].flatten(0, 1)  # so that what is recorded takes part in the graph
        if recompute:  # nothing in a layer is random, so no random state is kept
            stream, update, measured, _ = checkpoint(
                layer, stream, None, sequences, [None] * count, use_reentrant=False, preserve_rng_state=False
            )
        else:
            own = [None] * count if states is None else list(islice(left, count))
            stream, update, measured, own = layer(stream, update, sequences, own)
            new_states += own
        statistics.update({f"layers.{index}.{name}": router for name, router in measured.items()})
    return _sum(stream, update), statistics, new_states if states is not None else None


def initial_states(
    layers: Iterable[nn.Module], batch: int, dtype: torch.dtype, device: torch.device, room: int | None = None
) -> list[State | None]:
    """Each mixer's state before any token, layer by layer.

    Args:
        layers: ``Layer`` modules.
        batch: sequences.
        dtype: of the activations; what a scan keeps is fp32 at least.
        device: of the states.
        room: tokens that may come; None: any number, and attention's states grow.
    """
    mixers = (mixer for layer in layers for mixer in layer.mixers)  # type: ignore[union-attr]
    return [mixer.initial_state(batch, dtype, device, room) for mixer in mixers]  # type: ignore[union-attr]


def fp32_parameter_names(model: nn.Module) -> set[str]:
    """Parameters, and balance biases, that stay fp32 in a bf16 model: what each module declares of its own."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "fp32_names", ())
    }


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _sum(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update
