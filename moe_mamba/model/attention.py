"""Causal attention (Vaswani et al., 2017) with rotary positions or none, and grouped key and value heads.

Symbols: b batch, l length (new tokens), p past tokens in a state, h query heads, g key and value heads, e width of
a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.config import ModelConfig
from moe_mamba.model.initialize import Initializer, matrix
from moe_mamba.model.sequences import Sequences


@dataclass(frozen=True)
class AttentionState:
    """What attention keeps between passes: it grows by the tokens seen.

    Attributes:
        key: (batch, kv_heads, past, head_dim), already rotated.
        value: (batch, kv_heads, past, head_dim).
        start: (batch,) int64: place among the past tokens where the current document starts.
    """

    key: Tensor
    value: Tensor
    start: Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al., 2021, eq. 34), pairs half a head apart as in GPT-NeoX and Llama.

    Args:
        x: (b, heads, l, e), e even.
        positions: (b or 1, l) integers: tokens since the document's start.
        base: of the frequencies ``base ** (-2 i / e)``.

    Returns:
        ``x`` rotated, in its dtype; the angles and the products are fp32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=wide, device=x.device) / half)
    angle = (positions.to(wide)[:, :, None] * frequency)[:, None]  # (b or 1, 1, l, e / 2)
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Attention over the documents of each sequence; bias-free projections, named as in Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // config.heads
        kv_width = config.resolved_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        d_model = self.config.d_model
        inputs = {f"{name}.weight": matrix(self.config, d_model) for name in ("q_proj", "k_proj", "v_proj")}
        return inputs | {"o_proj.weight": matrix(self.config, d_model, residual=True)}

    def initial_state(self, batch: int) -> AttentionState:
        """Return the state before any token."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch, self.config.resolved_kv_heads, 0, self.head_dim)
        return AttentionState(empty, empty, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def forward(
        self, x: Tensor, sequences: Sequences, state: AttentionState | None = None
    ) -> tuple[Tensor, None, AttentionState | None]:
        """Attend from each token of ``x`` (tokens, d_model) to its document so far; returns (y, None, new state)."""
        query, key, value = (
            projection(x).view(sequences.batch, sequences.length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (b, h, l, e), (b, g, l, e), (b, g, l, e)
        place, start = self._places(sequences, state, x.device)  # (l,), (b or 1, l)
        if self.config.positions == "rope":
            query = rotate(query, place - start, self.config.rope_base)
            key = rotate(key, place - start, self.config.rope_base)
        mask = None
        if state is not None:
            key = torch.cat((state.key, key), dim=2)  # (b, g, p + l, e)
            value = torch.cat((state.value, value), dim=2)
            state = AttentionState(key, value, start[:, -1].expand(sequences.batch))
        if state is not None or sequences.starts is not None:
            other = torch.arange(key.shape[2], device=x.device)  # (p + l,)
            mask = ((other <= place[:, None]) & (other >= start[..., None]))[:, None]  # (b or 1, 1, l, p + l)
        y = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )  # (b, h, l, e)
        return self.o_proj(y.transpose(1, 2).reshape(sequences.tokens, -1)), None, state

    def _places(
        self, sequences: Sequences, state: AttentionState | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where each new token stands, past ones counted (l,), and where its document starts (b or 1, l)."""
        past = 0 if state is None else state.key.shape[2]
        place = torch.arange(past, past + sequences.length, device=device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if state is None else state.start[:, None]
        if sequences.starts is None:
            return place, first.expand(-1, sequences.length)
        return place, torch.where(sequences.starts, place, first).cummax(dim=1).values
