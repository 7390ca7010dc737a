"""Feed-forward layers."""

from torch import Tensor

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import activation
from moe_mamba.model.costs import enter, leave, record_activation
from moe_mamba.model.initialize import Initializer, matrix, zeros
from moe_mamba.model.linear import build_linear
from moe_mamba.model.mixers.base import Mixer, Statistics
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import Product, Share, Work, activation_work


def input_width(activation: str, width: int) -> int:
    """Columns of the input projection for a hidden width: SwiGLU has a gate beside the values."""
    return 2 * width if activation == "swiglu" else width


class FeedForward(Mixer):
    """Two matrices, with biases or without, and an activation between them."""

    letter, title = "-", "feed-forward"
    settings = ("resolved_d_ff", "activation", "mlp_bias")

    def __init__(
        self, config: ModelConfig, width: int | None = None, bias: bool = False, kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.width = width or config.resolved_d_ff
        self.in_proj = build_linear(config.d_model, input_width(config.activation, self.width), bias, kernels)
        self.out_proj = build_linear(self.width, config.d_model, bias, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "FeedForward":
        """See ``Mixer``."""
        return cls(config, bias=config.mlp_bias, kernels=kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        fills = {
            "in_proj.weight": matrix(self.config, self.config.d_model),
            "out_proj.weight": matrix(self.config, self.width, residual=True),
        }
        if self.in_proj.bias is not None:
            fills |= {"in_proj.bias": zeros, "out_proj.bias": zeros}
        return fills

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, Statistics, None]:
        """Map ``x`` (tokens, d_model) token by token; returns (y, {}, None)."""
        hidden = activation(self.in_proj(x), self.config.activation, self.kernels)  # (tokens, width)
        return self.out_proj(hidden), {}, None

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """Each rank has some hidden units."""
        return cls.hidden_specs(config, config.resolved_d_ff, "model.d_ff")

    @classmethod
    def kernel_operations(cls, config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
        """See ``Mixer``."""
        return {"activation": 0}

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """See ``Mixer``."""
        return cls.record_hidden(config, config.resolved_d_ff, share, tape, x, joins)

    @classmethod
    def record_hidden(
        cls, config: ModelConfig, width: int, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """Two products and an activation between them, of a hidden ``width`` that the ranks share."""
        tokens, d_model, hidden = share.tokens, config.d_model, width // share.tensor
        x = enter(tape, x, share, d_model, joins)
        y = tape.linear(x, tokens, d_model, input_width(config.activation, hidden))
        y = record_activation(tape, y, tokens, hidden, config.activation)
        return leave(tape, tape.linear(y, tokens, hidden, d_model), share, d_model, joins)

    @classmethod
    def hidden_specs(cls, config: ModelConfig, width: int, key: str) -> ShardSpecs:
        """How the two matrices are sharded: along the hidden ``width``, which the configuration's ``key`` sets."""
        block = Block(width, units=width)
        gates = input_width(config.activation, 1)  # [gate | up], or only up
        inputs = (ShardSpec(0, "tensor", (block,) * gates, key),)
        return {
            "in_proj.weight": inputs,
            "in_proj.bias": inputs,
            "out_proj.weight": (ShardSpec(1, "tensor", (block,), key),),
        }

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """See ``Mixer``."""
        return cls.hidden_work(config, config.resolved_d_ff, share)

    @classmethod
    def hidden_work(cls, config: ModelConfig, width: int, share: Share) -> list[Work]:
        """Two products and an activation between them, of a hidden ``width`` that the ranks share."""
        hidden, made = width // share.tensor, input_width(config.activation, width // share.tensor)
        return [
            Product(share.tokens, config.d_model, made),
            activation_work(share.tokens, made, hidden, share.width),
            Product(share.tokens, hidden, config.d_model),
        ]
