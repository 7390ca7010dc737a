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
    """What attention keeps between passes: it grows by the tokens seen, or has room for a fixed number of them.

    Attributes:
        key: (batch, kv_heads, past, head_dim), already rotated.
        value: (batch, kv_heads, past, head_dim).
        start: (batch,) int64: place among the past tokens where the current document starts.
        seen: () int64, how many of the places hold a token, the first ones; None: all do.
    """

    key: Tensor
    value: Tensor
    start: Tensor
    seen: Tensor | None = None

    @property
    def past(self) -> int | Tensor:
        """Tokens seen."""
        return self.key.shape[2] if self.seen is None else self.seen

    def extend(self, key: Tensor, value: Tensor, start: Tensor) -> "AttentionState":
        """Take up new tokens; where there is room for them, in place.

        Args:
            key: (batch, kv_heads, new, head_dim).
            value: (batch, kv_heads, new, head_dim).
            start: (batch,) as in the class.
        """
        if self.seen is None:
            key = torch.cat((self.key.to(key.dtype), key), dim=2)
            value = torch.cat((self.value.to(value.dtype), value), dim=2)
            return AttentionState(key, value, start)
        place = torch.arange(key.shape[2], device=key.device) + self.seen
        self.key.index_copy_(2, place, key.to(self.key.dtype))
        self.value.index_copy_(2, place, value.to(self.value.dtype))
        return AttentionState(self.key, self.value, start, self.seen + key.shape[2])


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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al., 2017, eq. 1) written down, which gives its weights too.

    Args:
        query: (b, h, l, e).
        key: (b, g, p, e), g a divisor of h.
        value: (b, g, p, e).
        mask: (b or 1, 1, l, p) bool, True where a query sees a key; None: causal, l = p.

    Returns:
        (b, h, l, e), and the weights (b, h, l, p), both in the dtype of the query; the softmax is fp32 at least.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (kept.to(query.dtype).repeat_interleave(groups, dim=1) for kept in (key, value))
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    score = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5  # (b, h, l, p)
    wide = torch.promote_types(query.dtype, torch.float32)
    weight = score.to(wide).masked_fill(~mask, -torch.inf).softmax(dim=-1).to(query.dtype)
    return weight @ value, weight


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

    def initial_state(
        self,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int | None = None,
    ) -> AttentionState:
        """Return the state before any token.

        Args:
            batch: sequences.
            dtype: of the activations.
            device: of the state.
            room: tokens that may come; None: any number, and the state grows.
        """
        shape = (batch, self.config.resolved_kv_heads, room or 0, self.head_dim)
        key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        seen = None if room is None else torch.zeros((), dtype=torch.int64, device=device)
        return AttentionState(key, value, torch.zeros(batch, dtype=torch.int64, device=device), seen)

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
            state = state.extend(key, value, start[:, -1].expand(sequences.batch))
            key, value = state.key, state.value  # (b, g, p + l, e)
        if state is not None or sequences.starts is not None:
            other = torch.arange(key.shape[2], device=x.device)  # (p + l,)
            mask = ((other <= place[:, None]) & (other >= start[..., None]))[:, None]  # (b or 1, 1, l, p + l)
        if sequences.recording.attentions is not None:
            y, weight = attend(query, key, value, mask)
            sequences.recording.attentions.append(weight)
        else:
            y = functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
            )  # (b, h, l, e)
        return self.o_proj(y.transpose(1, 2).reshape(sequences.tokens, -1)), None, state

    def _places(
        self, sequences: Sequences, state: AttentionState | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where each new token stands, past ones counted (l,), and where its document starts (b or 1, l)."""
        place = torch.arange(sequences.length, device=device) + (0 if state is None else state.past)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if state is None else state.start[:, None]
        if sequences.starts is None:
            return place, first.expand(-1, sequences.length)
        return place, torch.where(sequences.starts, place, first).cummax(dim=1).values
