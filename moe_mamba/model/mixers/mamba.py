"""The Mamba-1 mixer (Gu and Dao, arXiv 2312.00752, section 3.4), with Jamba's norms on request (arXiv 2403.19887).

Symbols, the paper's name first:

    D   d_model    width of the residual stream             Delta  delta   step size of a channel at a token
    E   expand     d_inner = E x D channels, by default     A      A       decay of a channel's states, negative
    N   d_state    states of a channel                      B      B       what of the input enters the states
    R   dt_rank    rank of delta's projection               C      C       what of the states is read
    x   x          input of a channel, after convolution    h      scan    the states
    z   z          gate, beside x

Parameters have the names of the library mamba-ssm.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import causal_conv, causal_conv_step, linear, selective_scan, selective_scan_step
from moe_mamba.kernels.selective_scan.intervals import BLOCK, CHUNK, GROUP, INTERVAL
from moe_mamba.model.costs import enter, leave, record_norm
from moe_mamba.model.initialize import Initializer, ones, uniform
from moe_mamba.model.linear import build_linear
from moe_mamba.model.mixers.base import Mixer, State, Statistics
from moe_mamba.model.norm import RMSNorm
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import FP32, Pass, Product, Scan, Sent, Share, Work, norm_work

SMALLEST_DELTA, LARGEST_DELTA, DELTA_FLOOR = 1e-3, 1e-1, 1e-4  # at the start of training


@dataclass(frozen=True)
class MambaState(State):
    """What the mixer keeps between passes; its size does not depend on the tokens seen.

    Attributes:
        conv: (batch, d_conv - 1, d_inner), the last inputs of the convolution, in the dtype of the activations.
        scan: (batch, d_inner, d_state), fp32 (fp64 in an fp64 model).
    """

    conv: Tensor
    scan: Tensor


class DepthwiseConv(nn.Module):
    """A causal convolution of each channel by itself, then SiLU: weight (channels, width) and bias (channels)."""

    def __init__(self, channels: int, width: int, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, x: Tensor, document_starts: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve whole sequences, or one more token of each; returns (y, new state), in the dtype of ``x``.

        Args:
            x: (batch, length, channels); one more token, after ``state``: (batch, channels).
            document_starts: (batch, length) bool, see ``Sequences``.
            state: (batch, width - 1, channels), the inputs before; None: zeros.
        """
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if x.dim() == 2:
            assert state is not None, "one more token goes on from a state"
            return causal_conv_step(x, weight, bias, state.to(x.dtype), self.kernels)
        return causal_conv(x, weight, bias, document_starts, None if state is None else state.to(x.dtype), self.kernels)


class StepProjection(nn.Module):
    """From delta's low rank to channels: weight (d_inner, dt_rank), bias (d_inner).

    The bias is not added: it stays fp32, and the scan adds it before its softplus. So this is no ``nn.Linear``, which
    quantisation and adapters would put another module with another sum in the place of.
    """

    fp32_names = ("bias",)

    def __init__(self, dt_rank: int, d_inner: int, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(d_inner, dt_rank))
        self.bias = nn.Parameter(torch.empty(d_inner))

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``dt`` (..., dt_rank) to (..., d_inner), in its dtype; beside it the bias (d_inner)."""
        # A view, since what shards or offloads a module's weights may take them back when this returns.
        return linear(dt, self.weight.to(dt.dtype), backend=self.kernels), self.bias.view_as(self.bias)


class Projected(NamedTuple):
    """What a mixer's input was projected to: x and z of figure 3, each (tokens, d_inner)."""

    x: Tensor
    z: Tensor


class Mamba(Mixer):
    """The mixer: two projections in, a short convolution, the selective scan, a gate, a projection out."""

    letter, title = "M", "Mamba"
    settings = ("d_state", "d_conv", "resolved_d_inner", "resolved_dt_rank", "selective", "mamba_norms")
    not_matrices = ("A_log",)

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.fp32_names = ("A_log", "D") if config.selective else ("A_log", "D", "dt_B_C")
        d_inner, d_state, dt_rank = config.resolved_d_inner, config.d_state, config.resolved_dt_rank
        self.in_proj = build_linear(config.d_model, 2 * d_inner, kernels=kernels)
        self.conv1d = DepthwiseConv(d_inner, config.d_conv, kernels)
        if config.selective:
            self.x_proj = build_linear(d_inner, dt_rank + 2 * d_state, kernels=kernels)
        else:
            self.dt_B_C = nn.Parameter(torch.empty(dt_rank + 2 * d_state))  # the same for every token
        self.dt_proj = StepProjection(dt_rank, d_inner, kernels)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = build_linear(d_inner, config.d_model, kernels=kernels)
        if config.mamba_norms:
            self.dt_norm = RMSNorm(dt_rank, config.norm_epsilon, kernels)
            self.B_norm = RMSNorm(d_state, config.norm_epsilon, kernels)
            self.C_norm = RMSNorm(d_state, config.norm_epsilon, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Mamba":
        """See ``Mixer``."""
        return cls(config, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start: as in mamba-ssm, whatever ``model.initialization`` says.

        By default ``out_proj`` is smaller by sqrt(layers), as that library's language model has it; the authors of
        MoE-Mamba took the bare mixer, without.
        """
        config = self.config
        return {
            "in_proj.weight": uniform(config.d_model),
            "conv1d.weight": uniform(config.d_conv),
            "conv1d.bias": uniform(config.d_conv),
            **(
                {"x_proj.weight": uniform(config.resolved_d_inner)} if config.selective else {"dt_B_C": self._constants}
            ),
            "dt_proj.weight": uniform(config.resolved_dt_rank),
            "dt_proj.bias": _delta_bias,
            "A_log": _A_log,
            "D": ones,
            "out_proj.weight": uniform(config.resolved_d_inner, out_scale(config)),
        }

    def initial_state(
        self,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int | None = None,
    ) -> MambaState:
        """Return the state before any token; ``dtype`` is the activations'. Its size is the same for any ``room``."""
        channels = len(self.D)  # d_inner, or a shard of it
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.config.d_conv - 1, channels, dtype=dtype, device=device),
            torch.zeros(batch, channels, self.config.d_state, dtype=wide, device=device),
        )

    def forward(
        self, x: Tensor, sequences: Sequences, state: MambaState | None = None
    ) -> tuple[Tensor, Statistics, MambaState | None]:
        """Mix each token of ``x`` (tokens, d_model) with its document so far; returns (y, statistics, new state)."""
        projected = self.project(x, sequences)
        new_state: MambaState | None
        if state is not None and sequences.length == 1 and sequences.document_starts is None:
            y, new_state = self._step(projected.x, projected.z, state)
        else:
            shape = sequences.batch, sequences.length, -1
            y, new_state = self._pass(
                projected.x.view(shape), projected.z.view(shape), sequences.document_starts, state
            )
            y = y.reshape(sequences.tokens, -1)
        y, statistics = self.project_back(y, projected, sequences)
        return y, statistics, new_state

    def project(self, u: Tensor, sequences: Sequences) -> Any:
        """From the mixer's input (tokens, d_model) to x and z, each (tokens, d_inner); see ``Projected``."""
        return Projected(*self.in_proj(u).chunk(2, dim=-1))

    def project_back(self, y: Tensor, projected: Any, sequences: Sequences) -> tuple[Tensor, Statistics]:
        """From channels (tokens, d_inner) to (tokens, d_model), with the statistics of the mixer's routers."""
        return self.out_proj(y), {}

    def _pass(
        self, x: Tensor, z: Tensor, document_starts: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        """Convolution and scan of whole sequences; x and z (batch, length, d_inner)."""
        conv, scan = (None, None) if state is None else (state.conv, state.scan)
        x, conv = self.conv1d(x, document_starts, conv)
        delta, bias, B, C = self._select(x)
        A = -torch.exp(self.A_log)  # (d_inner, d_state); section 3.6
        kernels = self.kernels
        if kernels == "vendor" and state is not None:
            kernels = "auto"  # the vendor's scan serves only training: it starts from zeros
        y, scan = selective_scan(
            x, delta, A, B, C, self.D, z, bias, document_starts, scan, kernels
        )  # equations 2a, 2b and 4, and the gate
        return y, None if state is None else MambaState(conv, scan)

    def _step(self, x: Tensor, z: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """What ``_pass`` computes of one more token; x and z (batch, d_inner)."""
        x, conv = self.conv1d(x, None, state.conv)  # (batch, d_inner)
        delta, bias, B, C = self._select(x)
        A = -torch.exp(self.A_log)
        y, scan = selective_scan_step(x, delta, A, B, C, self.D, z, bias, state.scan, self.kernels)
        return y, MambaState(conv, scan)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What makes the scan selective: delta, B and C from the input (algorithm 2, section 3.6).

        Without ``model.selective`` they are learned constants: the scan is linear and time-invariant, which is a long
        convolution (algorithm 1; here B and C are shared among channels).

        Args:
            x: (..., d_inner).

        Returns:
            delta before its bias and softplus (..., d_inner); that bias (d_inner); B and C (..., d_state).
        """
        d_state = self.config.d_state
        made = self.x_proj(x) if self.config.selective else self.dt_B_C.to(x.dtype).expand(*x.shape[:-1], -1)
        dt, B, C = made.split((self.config.resolved_dt_rank, d_state, d_state), dim=-1)
        if self.config.mamba_norms:
            (dt, _), (B, _), (C, _) = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return *self.dt_proj(dt), B, C

    def _constants(self, weight: Tensor, generator: Generator) -> None:
        """As S4D starts (Gu et al., arXiv 2206.11893): delta is only its bias, B is one, C standard normal."""
        dt, B, C = weight.split((self.config.resolved_dt_rank, self.config.d_state, self.config.d_state))
        dt.zero_()
        B.fill_(1.0)
        C.normal_(generator=generator)

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """Each rank has some channels. What ``x_proj`` makes of all channels is used by every rank: it is reduced."""

        def channels(axis: int, blocks: int = 1, is_reduced: bool = False) -> tuple[ShardSpec, ...]:
            block = Block(config.resolved_d_inner, units=config.resolved_d_inner)
            return (ShardSpec(axis, "tensor", (block,) * blocks, config.d_inner_key, is_reduced=is_reduced),)

        return {
            "in_proj.weight": channels(0, blocks=2),  # [x | z]
            "conv1d.weight": channels(0),
            "conv1d.bias": channels(0),
            "x_proj.weight": channels(1, is_reduced=True),
            "dt_proj.weight": channels(0),
            "dt_proj.bias": channels(0),
            "A_log": channels(0),
            "D": channels(0),
            "out_proj.weight": channels(1),
        }

    @classmethod
    def kernel_operations(cls, config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
        """See ``Mixer``."""
        used = {"selective_scan": config.d_state, "causal_conv": config.d_conv}
        return used | {"rms_norm": 0} if config.mamba_norms else used

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """See ``Mixer``."""
        tokens, d_model, channels = share.tokens, config.d_model, config.resolved_d_inner // share.tensor
        x = enter(tape, x, share, d_model, joins)
        both = tape.linear(x, tokens, d_model, 2 * channels)
        y = cls.record_inner(config, share, tape, *tape.split(both, tokens * channels, tokens * channels))
        return leave(tape, tape.linear(y, tokens, channels, d_model), share, d_model, joins)

    @classmethod
    def record_inner(cls, config: ModelConfig, share: Share, tape: Tape, x: Recorded, z: Recorded) -> Recorded:
        """All but the projections in and out."""
        tokens, channels = share.tokens, config.resolved_d_inner // share.tensor
        low_rank, states = config.resolved_dt_rank, config.d_state
        sizes = low_rank, states, states
        x = tape.one(x, numbers=tokens * channels, keeps=(x,))  # convolution
        if config.selective:
            made = tape.linear(x, tokens, channels, sum(sizes))
            if share.tensor > 1:
                made = tape.one(made, numbers=tokens * sum(sizes))
        else:
            made = tape.tensor(tokens * sum(sizes))
        delta, B, C = tape.split(made, *(tokens * size for size in sizes))
        if config.mamba_norms:
            pairs = zip((delta, B, C), sizes, strict=True)
            delta, B, C = (record_norm(tape, part, None, tokens, size)[0] for part, size in pairs)
        delta = tape.linear(delta, tokens, low_rank, channels)
        state = share.batch * channels * states  # of all sequences
        steps = INTERVAL if tape.fused else CHUNK
        kept = tape.tensor(state * -(-share.length // steps), FP32)
        partial = tokens * 2 * states * FP32 * -(-channels // (BLOCK if tape.fused else GROUP))
        operands = (x, delta, B, C, z)
        return tape.one(
            *operands,
            numbers=tokens * channels,
            keeps=(*operands, kept),
            forward=state * FP32,
            backward=2 * state * FP32 + (partial if tape.hidden else 0),
        )

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """See ``Mixer``: the projections in and out, and what is between them."""
        channels = config.resolved_d_inner // share.tensor
        ways = [Product(share.tokens, config.d_model, 2 * channels), Product(share.tokens, channels, config.d_model)]
        return [*ways, *cls.inner_work(config, share)]

    @classmethod
    def inner_work(cls, config: ModelConfig, share: Share) -> list[Work]:
        """All but the projections in and out."""
        tokens, width, channels = share.tokens, share.width, config.resolved_d_inner // share.tensor
        low_rank, states = config.resolved_dt_rank, config.d_state
        made, channel_bytes = low_rank + 2 * states, tokens * channels * width
        work: list[Work] = [
            Product(tokens, low_rank, channels),
            Pass(2 * channel_bytes, 7 * channel_bytes, 3),  # convolution; backward x and z are joined again, too
            Scan(tokens, channels, states, width),
            Pass(0, 2 * tokens * made * width),  # delta, B and C are joined again
        ]
        if config.selective:
            work.append(Product(tokens, channels, made))
        if config.mamba_norms:
            work.append(norm_work(tokens, made, width)._replace(operators=6))
        return work

    @classmethod
    def sends(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Sent]:
        """See ``Mixer``: what ``x_proj`` makes of all channels, and its gradient, are summed over the ranks."""
        made = config.resolved_dt_rank + 2 * config.d_state
        size = share.tokens * made * share.width
        return [Sent("all-reduce", "tensor", size, forward=1, backward=1)] if config.selective else []

    def flops_per_token(self, length: int) -> int:
        """The matrices' and, for the scan, 9 a state forward (Mamba, section 4.5), three times that in all."""
        return super().flops_per_token(length) + 27 * self.config.resolved_d_inner * self.config.d_state


def out_scale(config: ModelConfig) -> float:
    """How much smaller than others the projection to the stream starts."""
    return 1.0 if config.initialization == "authors" else 1 / math.sqrt(config.updates)


def _A_log(weight: Tensor, generator: Generator) -> None:
    """S4D-real (section 3.6): A[n] = -n for n from 1."""
    weight.copy_(torch.arange(1, weight.shape[1] + 1, dtype=torch.float32).log().expand_as(weight))


def _delta_bias(weight: Tensor, generator: Generator) -> None:
    """The inverse of softplus of a delta that is log-uniform in [0.001, 0.1] (section 3.6)."""
    weight.uniform_(math.log(SMALLEST_DELTA), math.log(LARGEST_DELTA), generator=generator)
    delta = weight.exp().clamp_(min=DELTA_FLOOR)
    weight.copy_(delta + torch.log(-torch.expm1(-delta)))
