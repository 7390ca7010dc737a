"""The whole model: embedding -> layers -> norm -> head, and what it counts about itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import Initializer, embedding_weight, head_weight
from moe_mamba.model.layer import State, build_layers, fp32_parameter_names, initial_states, run_layers
from moe_mamba.model.loss import cross_entropy_sum
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import Experts, MoE
from moe_mamba.model.mixers.routing import Router, RouterStatistics
from moe_mamba.model.norm import LayerNorm, RMSNorm, build_norm
from moe_mamba.model.sequences import Sequences


@dataclass(frozen=True)
class Output:
    """What a pass gives.

    Attributes:
        logits: (batch, length, vocab).
        statistics: one for each layer of experts, in order.
        states: one for each layer, where states were passed in; else None.
    """

    logits: Tensor
    statistics: list[RouterStatistics]
    states: list[State] | None


class LanguageModel(nn.Module):
    """A decoder of layers named by ``model.pattern``.

    Its weights are whatever memory held until ``initialize`` or a checkpoint fills them.

    Attributes:
        recompute: in training keep only each layer's input, and compute the rest again in the backward pass.
        project: turns a normalised stream and the (vocab, d_model) weight into logits (tokens, vocab).
        cross_entropy: sums the loss over logits and targets, see ``loss.cross_entropy_sum``.
        likeliest: ids of the largest logits. A layout that cuts the vocabulary puts other functions in the place of
            these three, and its logits are a rank's part.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.config = model
        self.moe_config = moe
        self.recompute = False
        self.project: Callable[[Tensor, Tensor], Tensor] = functional.linear
        self.cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = partial(
            cross_entropy_sum, backend=model.kernels
        )
        self.likeliest: Callable[[Tensor], Tensor] = partial(Tensor.argmax, dim=-1)
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.layers = build_layers(model, moe)
        self.final_norm = build_norm(model) if model.final_norm else None
        self.head = None if model.tied_head else nn.Linear(model.d_model, model.vocab_size, bias=False)

    def initializers(self) -> dict[str, Initializer]:
        """How embedding and head start."""
        fill = {"embedding.weight": embedding_weight(self.config)}
        return fill if self.head is None else fill | {"head.weight": head_weight(self.config)}

    def initial_states(self, batch: int) -> list[State]:
        """Return each layer's state before any token, for ``batch`` sequences."""
        weight = self.embedding.weight
        return initial_states(self.layers, batch, weight.dtype, weight.device)

    def forward(self, tokens: Tensor, starts: Tensor | None = None, states: Sequence[State] | None = None) -> Output:
        """Predict the token after each one.

        Args:
            tokens: (batch, length) int64.
            starts: (batch, length) bool, True where a document starts: nothing before it is seen. None: each
                sequence is one document, or goes on from its state.
            states: from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
        """
        stream, statistics, new_states = self.hidden(tokens, starts, states)
        return Output(self.logits(stream).unflatten(0, tokens.shape), statistics, new_states)

    def hidden(
        self, tokens: Tensor, starts: Tensor | None = None, states: Sequence[State] | None = None
    ) -> tuple[Tensor, list[RouterStatistics], list[State] | None]:
        """As ``forward``, but give the residual stream after the last layer, (tokens, d_model), for logits."""
        sequences = Sequences(tokens.shape[0], tokens.shape[1], starts)
        return self.mix(self.embedding(tokens.flatten()), sequences, states)

    def mix(
        self, stream: Tensor, sequences: Sequences, states: Sequence[State] | None = None
    ) -> tuple[Tensor, list[RouterStatistics], list[State] | None]:
        """Run the layers over embedded tokens (tokens, d_model); returns the stream, statistics and new states."""
        return run_layers(self.layers, stream, sequences, states, self.recompute and self.training)

    def logits(self, stream: Tensor) -> Tensor:
        """Turn (tokens, d_model) from the last layer into logits (tokens, vocab)."""
        if self.final_norm is not None:
            stream, _ = self.final_norm(stream)
        return self.project(stream, self.embedding.weight if self.head is None else self.head.weight)

    def routers(self) -> list[Router]:
        """Routers of the layers of experts, in the order of a pass's statistics."""
        return [mixer.router for mixer in self._mixers(MoE)]

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
        return {"total": total, "active": total - self._idle_parameters(), "norm": norm, "embedding": embedding}

    def _idle_parameters(self) -> int:
        """Parameters of the routed experts that a token does not meet."""
        routed = sum(_numel(module) for module in self.modules() if isinstance(module, Experts))
        return routed - routed * self.moe_config.top_k // self.moe_config.experts

    def flops_per_token(self, length: int) -> int:
        """Count the floating-point operations of one token, forward and backward, in sequences of ``length``.

        6 for each weight of a matrix that a token meets (a multiplication and an addition forward, twice that
        backward), the head's and the convolution's included, the embedding's not, since looking up is no product;
        6 x length x heads x head_dim for each attention layer (queries with keys, weights with values, half of them
        masked; with a sliding window of w < length tokens, 2 w - w^2 / length in the place of length);
        27 x d_inner x d_state for each Mamba layer (9 a state forward, as Mamba's section 4.5 counts the scan,
        three times that for both). Recomputation and empty slots of experts are not counted.
        """
        config = self.config
        matrices = sum(weight.numel() for name, weight in self.named_parameters() if weight.dim() > 1)
        matrices -= self._idle_parameters()
        if self.head is not None:
            matrices -= self.embedding.weight.numel()
        matrices -= sum(mixer.A_log.numel() for mixer in self._mixers(Mamba))
        window = min(config.sliding_window or length, length)
        seen = 2 * window * length - window**2  # twice the keys that a sequence's tokens see in all
        width = config.heads * config.resolved_head_dim
        attention = 6 * seen * width // length * len(self._mixers(Attention))
        scan = 27 * config.d_inner * config.d_state * len(self._mixers(Mamba))
        return 6 * matrices + attention + scan

    def _mixers(self, kind: type) -> list:
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, kind)]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
