"""The whole model: embedding -> layers -> norm -> head, and what it counts about itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import linear
from moe_mamba.kernels.cross_entropy.linear import linear_cross_entropy, linear_scores
from moe_mamba.model.initialize import Initializer, embedding_weight, head_weight
from moe_mamba.model.layer import build_layers, fp32_parameter_names, initial_states, run_layers
from moe_mamba.model.linear import build_linear
from moe_mamba.model.mixers.base import Mixer, State, Statistics
from moe_mamba.model.mixers.routing import Router, unchanged
from moe_mamba.model.names import logical_names
from moe_mamba.model.norm import LayerNorm, RMSNorm, build_norm
from moe_mamba.model.pattern import layer_specs
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs, prefixed


@dataclass(frozen=True)
class Output:
    """What a pass gives.

    Attributes:
        logits: (batch, length, vocab); None where targets were passed in.
        statistics: of each router, by its full name, in order.
        states: one for each mixer, where states were passed in; else None.
        cross_entropy: where targets were passed in, the sum of the loss over those that count, in nats, () in fp32
            (float64 for a float64 model).
        right: where targets were passed in and no gradient is asked for, how many of them are the argmax, () int64.
    """

    logits: Tensor | None
    statistics: Statistics
    states: list[State | None] | None
    cross_entropy: Tensor | None = None
    right: Tensor | None = None


class LanguageModel(nn.Module):
    """A decoder of layers named by ``model.pattern``.

    Its weights are whatever memory held until ``initialize`` or a checkpoint fills them.

    Attributes:
        recompute: in training keep only each layer's input, and compute the rest again in the backward pass.
        project: turns a normalised stream and the (vocab, d_model) weight into logits (tokens, vocab).
        cross_entropy: of a normalised stream, the weight and targets (tokens): the loss's sum, by chunks of tokens.
        scores: of the same, without gradients: that sum, and how many targets are the argmax.
        gather_logits: turns logits into those of the whole vocabulary, (..., vocab). A layout that shards the
            vocabulary puts other functions in the place of these four, and its logits are a rank's part.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = model
        self.moe_config = moe
        self.kernels = kernels
        self.recompute = False
        self.project: Callable[[Tensor, Tensor], Tensor] = partial(linear, backend=kernels)
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(linear_cross_entropy, backend=kernels)
        self.scores: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = partial(
            linear_scores, argmax=partial(torch.argmax, dim=-1), backend=kernels
        )
        self.gather_logits: Callable[[Tensor], Tensor] = unchanged
        # Its own start would be thrown away; on the meta device it would import torch's compiler, besides.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(model.vocab_size, model.d_model), freeze=False)
        self.layers = build_layers(model, moe, kernels)
        self.final_norm = build_norm(model, kernels) if model.final_norm else None
        self.head = None if model.tied_head else build_linear(model.d_model, model.vocab_size, kernels=kernels)

    @classmethod
    def on_meta(cls, model: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> "LanguageModel":
        """The model without memory: modules, names and shapes."""
        with torch.device("meta"):
            return cls(model, moe, kernels)

    def logical_tensors(self) -> dict[str, Tensor]:
        """Logical name -> parameter or buffer itself: what a checkpoint holds of a whole model."""
        names = logical_names(self)
        return {names[path]: tensor for path, tensor in self.state_dict(keep_vars=True).items()}

    def initializers(self) -> dict[str, Initializer]:
        """How embedding and head start."""
        fill = {"embedding.weight": embedding_weight(self.config)}
        return fill if self.head is None else fill | {"head.weight": head_weight(self.config)}

    def initial_states(self, batch: int) -> list[State | None]:
        """Return each mixer's state before any token, for ``batch`` sequences."""
        weight = self.embedding.weight
        return initial_states(self.layers, batch, weight.dtype, weight.device)

    def forward(
        self,
        tokens: Tensor,
        document_starts: Tensor | None = None,
        states: Sequence[State | None] | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        """Predict the token after each one, or compare it with what should come.

        Args:
            tokens: (batch, length) int64.
            document_starts: (batch, length) bool, True where a document starts: nothing before it is seen. None: each
                sequence is one document, or goes on from its state.
            states: from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
            targets: (batch, length) int64, the token after each one, -100 where nothing is counted. With them there
                is a loss and no logits, which never stand in memory for all tokens.
        """
        stream, statistics, new_states = self.hidden(tokens, document_starts, states)
        if targets is None:
            return Output(self.logits(stream).unflatten(0, tokens.shape), statistics, new_states)
        return Output(None, statistics, new_states, *self.losses(stream, targets.flatten()))

    def hidden(
        self, tokens: Tensor, document_starts: Tensor | None = None, states: Sequence[State | None] | None = None
    ) -> tuple[Tensor, Statistics, list[State | None] | None]:
        """As ``forward``, but give the residual stream after the last layer, (tokens, d_model), for logits."""
        sequences = Sequences(tokens.shape[0], tokens.shape[1], document_starts)
        return self.mix(self.embedding(tokens.flatten()), sequences, states)

    def mix(
        self, stream: Tensor, sequences: Sequences, states: Sequence[State | None] | None = None
    ) -> tuple[Tensor, Statistics, list[State | None] | None]:
        """Run the layers over embedded tokens (tokens, d_model); returns the stream, statistics and new states."""
        return run_layers(self.layers, stream, sequences, states, self.recompute and self.training)

    def logits(self, stream: Tensor) -> Tensor:
        """Turn (tokens, d_model) from the last layer into logits (tokens, vocab)."""
        return self.project(*self._head(stream))

    def losses(self, stream: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn (tokens, d_model) from the last layer and targets (tokens) into ``cross_entropy`` and ``right``."""
        if torch.is_grad_enabled():
            return self.cross_entropy(*self._head(stream), targets), None
        return self.scores(*self._head(stream), targets)

    def _head(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised stream (tokens, d_model), and the weight (vocab, d_model) that turns it into logits."""
        if self.final_norm is not None:
            stream, _ = self.final_norm(stream)
        return stream, self.embedding.weight if self.head is None else self.head.weight

    def routers(self) -> dict[str, Router]:
        """Routers by their full names, as a pass's statistics are."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Router)}

    def balanced_routers(self) -> set[str]:
        """Names of the routers that have a balance loss."""
        return {name for name, router in self.routers().items() if router.config.balance == "loss"}

    def mixers(self) -> list[Mixer]:
        """The mixers of all layers, in order."""
        return [mixer for layer in self.layers for mixer in layer.mixers]  # type: ignore[union-attr]

    def fp32_parameter_names(self) -> set[str]:
        """Parameters, and balance biases, that stay fp32 in a bf16 model: small, and sensitive to rounding."""
        return fp32_parameter_names(self)

    def parameter_counts(self) -> dict[str, int]:
        """Count parameters; works on the meta device.

        Returns:
            ``total`` and ``active`` (what a token meets: ``top_k`` of the routed experts), both without embedding,
            head and norms, as the paper counts; ``norm`` (those inside Mamba too); ``embedding`` (with the head).
        """
        everything = _numel(self)
        embedding = _numel(self.embedding) + (0 if self.head is None else _numel(self.head))
        norm = sum(_numel(module) for module in self.modules() if isinstance(module, RMSNorm | LayerNorm))
        total = everything - embedding - norm
        idle = sum(mixer.idle_parameters() for mixer in self.mixers())
        return {"total": total, "active": total - idle, "norm": norm, "embedding": embedding}

    def flops_per_token(self, length: int) -> int:
        """Count the floating-point operations of one token, forward and backward, in sequences of ``length``.

        What each mixer counts of its own, and 6 for each weight of the head; the embedding's do not count, since
        looking up is no product, nor do recomputation and empty slots of experts.
        """
        head = self.embedding if self.head is None else self.head
        return 6 * head.weight.numel() + sum(mixer.flops_per_token(length) for mixer in self.mixers())

    def not_decayed(self) -> set[str]:
        """Full names of the parameters of two axes that are no matrices."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Mixer)
            for name in module.not_matrices
        }


def shard_specs(config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
    """Full name -> sharded axes, of every parameter that is sharded in some layout."""
    vocabulary = ShardSpec(
        0, "tensor", (Block(config.vocab_size, units=config.vocab_size),), "model.vocab_size", is_padded=True
    )
    specs: ShardSpecs = {"embedding.weight": (vocabulary,), "head.weight": (vocabulary,)}
    for index, spec in enumerate(layer_specs(config, moe)):
        for place, mixer in enumerate(spec.mixers):
            name = f"layers.{index}.mixer" + f".{place}" * (len(spec.mixers) > 1)
            specs |= prefixed(name, mixer.shard_specs(config, moe))
    return specs


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
