"""Causal attention (Vaswani et al., 2017) with rotary positions or none, and grouped key and value heads.

Over all of a document so far, or over a sliding window of it.

Symbols: b batch, l length (new tokens), p past tokens in a state, h query heads, g key and value heads, e width of
a head.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.costs import enter, leave
from moe_mamba.model.initialize import Initializer, matrix, zeros
from moe_mamba.model.linear import build_linear
from moe_mamba.model.mixers.base import Mixer, State, Statistics, choose_rows
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import FP32, Attended, Pass, Product, Share, Work


@dataclass(frozen=True)
class AttentionState(State):
    """What attention keeps between passes: it grows by the tokens seen, to at most ``model.sliding_window`` - 1.

    Or it has room for a fixed number of tokens, none of which it leaves behind.

    Attributes:
        key: (batch, kv_heads, past, head_dim), already rotated.
        value: (batch, kv_heads, past, head_dim).
        start: (batch,) int64: place among the past tokens where the current document starts; below 0 where that is a
            token that the window has left behind.
        seen: () int64, how many of the places hold a token, the first ones; None: all do.
    """

    key: Tensor
    value: Tensor
    start: Tensor
    seen: Tensor | None = None

    @property
    def past(self) -> int | Tensor:
        """Tokens that are kept."""
        return self.key.shape[2] if self.seen is None else self.seen

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of new tokens behind them; where there is room, in place and without gradient.

        Args:
            key: (batch, kv_heads, new, head_dim).
            value: (batch, kv_heads, new, head_dim).
        """
        if self.seen is None and not self.key.shape[2]:
            return key, value  # of this rank's heads, where they are sharded
        if self.seen is None:
            return torch.cat((self.key.to(key.dtype), key), dim=2), torch.cat(
                (self.value.to(value.dtype), value), dim=2
            )
        place = torch.arange(key.shape[2], device=key.device) + self.seen
        self.key.index_copy_(2, place, key.detach().to(self.key.dtype))
        self.value.index_copy_(2, place, value.detach().to(self.value.dtype))
        return self.key, self.value

    def kept_where(self, waits: Tensor, new: Any, tokens: int) -> Any:
        """See ``State``: keys and values of rows that wait move behind the places that the tokens took."""
        if new.seen is None:  # the last of what it was, where a window keeps no more of it
            kept, length = new.key.shape[2], self.key.shape[2]
            source = (torch.arange(kept, device=waits.device) + length - kept).clamp(min=0)
            key, value = (
                choose_rows(waits, was[:, :, source], now)
                for was, now in ((self.key, new.key), (self.value, new.value))
            )
            return replace(new, key=key, value=value, start=torch.where(waits, self.start + kept - length, new.start))
        place = torch.arange(new.key.shape[2], device=waits.device)
        moved = torch.where((place >= tokens) & (place < new.seen), place - tokens, place)
        source = torch.where(waits[:, None], moved, place)[:, None, :, None].expand_as(new.key)
        key, value = new.key.gather(2, source), new.value.gather(2, source)
        return replace(new, key=key, value=value, start=torch.where(waits, self.start + tokens, new.start))


def rotary_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angles that each pair of a head's channels turns by from token to token (Su et al., 2021, section 3.2.2).

    ``linear`` slows all of them (position interpolation; Chen et al., arXiv 2306.15595, section 2.3). ``llama3`` slows
    those that turn at most ``rope_low_freq_factor`` times in the original context, leaves those that turn at least
    ``rope_high_freq_factor`` times, and blends the two by the number of turns in between (Llama 3.1; ``apply_scaling``
    of Meta's reference implementation in llama-models).

    Args:
        config: has base, width of a head, and scaling.
        dtype: of the result.
        device: of the result.

    Returns:
        (head_dim / 2,), radians: ``base ** (-2 i / head_dim)``, scaled.
    """
    half = config.resolved_head_dim // 2
    frequency = config.rope_base ** -(torch.arange(half, dtype=dtype, device=device) / half)
    if config.rope_type == "default":
        return frequency
    if config.rope_type == "linear":
        return frequency / config.rope_factor
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the frequency that is left as it is
    return frequency * (kept + (1 - kept) / config.rope_factor)


def rotate(x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, eq. 34), pairs half a head apart as in GPT-NeoX and Llama.

    Args:
        x: (b, heads, l, e), e even.
        positions: (b or 1, l) integers: tokens since the document's start.
        frequency: (e / 2,), from ``rotary_frequencies``; its dtype is that of the angles and the products.

    Returns:
        ``x`` rotated, in its dtype.
    """
    angle = (positions.to(frequency.dtype)[:, :, None] * frequency)[:, None]  # (b or 1, 1, l, e / 2)
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(frequency.dtype).chunk(2, dim=-1)
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


class Attention(Mixer):
    """Attention over the documents of each sequence, or over a window of them; projections named as in Llama."""

    letter, title = "*", "attention"
    settings = (
        *("heads", "resolved_kv_heads", "resolved_head_dim", "sliding_window", "attention_bias"),
        *("positions", "rope_base", "rope_type"),
    )

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.head_dim, bias = config.resolved_head_dim, config.attention_bias
        width, kv_width = config.heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        self.q_proj = build_linear(config.d_model, width, bias, kernels)
        self.k_proj = build_linear(config.d_model, kv_width, bias, kernels)
        self.v_proj = build_linear(config.d_model, kv_width, bias, kernels)
        self.o_proj = build_linear(width, config.d_model, bias, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Attention":
        """See ``Mixer``."""
        return cls(config, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        inputs = ("q_proj", "k_proj", "v_proj")
        fills = {f"{name}.weight": matrix(self.config, self.config.d_model) for name in inputs}
        fills["o_proj.weight"] = matrix(self.config, self.config.heads * self.head_dim, residual=True)
        if self.config.attention_bias:
            fills |= {f"{name}.bias": zeros for name in (*inputs, "o_proj")}
        return fills

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
    ) -> tuple[Tensor, Statistics, AttentionState | None]:
        """Attend from each token of ``x`` (tokens, d_model) to its document so far; returns (y, {}, new state)."""
        query, key, value = (
            projection(x).view(sequences.batch, sequences.length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (b, h, l, e), (b, g, l, e), (b, g, l, e)
        place, start = self._places(sequences, state, x.device)  # (l,), (b or 1, l)
        if self.config.positions == "rope":
            wide = torch.promote_types(query.dtype, torch.float32)
            frequency = rotary_frequencies(self.config, wide, x.device)
            query, key = rotate(query, place - start, frequency), rotate(key, place - start, frequency)
        mask, window = None, self.config.sliding_window or sequences.length
        if state is not None:
            key, value = state.extended(key, value)  # (b, g, p + l, e)
        if state is not None or sequences.document_starts is not None or sequences.length > window:
            mask = self._mask(place, start, key.shape[2])
        if sequences.recording.attentions is not None:
            y, weight = attend(query, key, value, mask)
            sequences.recording.attentions.append(weight)
        else:
            y = functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
            )  # (b, h, l, e)
        if state is not None:
            last = start[:, -1].expand(sequences.batch)
            seen = None if state.seen is None else state.seen + sequences.length
            state = self._kept(key, value, last) if seen is None else AttentionState(key, value, last, seen)
        return self.o_proj(y.transpose(1, 2).reshape(sequences.tokens, -1)), {}, state

    def _mask(self, place: Tensor, start: Tensor, seen: int) -> Tensor:
        """Which of ``seen`` tokens, past ones first, each new one attends to, (b or 1, 1, l, seen) bool.

        None before its document; with a window of W, itself and the W - 1 tokens before it (Mistral 7B; Jiang et al.,
        arXiv 2310.06825, section 2).
        """
        window = self.config.sliding_window
        first = start if window is None else start.maximum(place - window + 1)  # (b or 1, l)
        other = torch.arange(seen, device=place.device)
        return ((other <= place[:, None]) & (other >= first[..., None]))[:, None]

    def _kept(self, key: Tensor, value: Tensor, start: Tensor) -> AttentionState:
        """What tokens to come may attend to of keys and values (b, g, p + l, e); ``start`` (b,) is among them."""
        window = self.config.sliding_window
        dropped = 0 if window is None else max(0, key.shape[2] - window + 1)
        if dropped:  # copies, so that what is dropped lets go of its memory
            key, value = key[:, :, dropped:].clone(), value[:, :, dropped:].clone()
        return AttentionState(key, value, start - dropped)

    def _places(
        self, sequences: Sequences, state: AttentionState | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where each new token stands, past ones counted (l,), and where its document starts (b or 1, l)."""
        place = torch.arange(sequences.length, device=device) + (0 if state is None else state.past)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if state is None else state.start[:, None]
        if sequences.document_starts is None:
            return place, first.expand(-1, sequences.length)
        return place, torch.where(sequences.document_starts, place, first).cummax(dim=1).values

    @classmethod
    def check(cls, config: ModelConfig, moe: MoEConfig) -> None:
        """Refuse heads that do not divide, and rotary positions of an odd width or with a scaling that does nothing.

        Raises:
            ValueError: see ``Mixer``.
        """
        if config.head_dim is None and config.d_model % config.heads:
            raise ValueError(
                f"model.d_model={config.d_model} is not divisible by model.heads={config.heads}: "
                "change one of them, or set model.head_dim"
            )
        if config.heads % config.resolved_kv_heads:
            raise ValueError(
                f"model.heads={config.heads} is not divisible by model.kv_heads={config.kv_heads}: change one of them"
            )
        if config.positions == "rope" and config.resolved_head_dim % 2:
            width = "model.d_model / model.heads" if config.head_dim is None else "model.head_dim"
            raise ValueError(
                f"{width} = {config.resolved_head_dim} is odd: "
                "rotary positions need an even one, or set model.positions=none"
            )
        if config.rope_type != "default" and config.positions != "rope":
            raise ValueError(
                f"model.rope_type={config.rope_type} with model.positions={config.positions}, which has no rotary "
                "frequencies: set model.rope_type=default, or model.positions=rope"
            )
        if config.rope_type == "default" and config.rope_factor != 1:
            raise ValueError(
                f"model.rope_factor={config.rope_factor:g} with model.rope_type=default, which scales nothing: "
                "set model.rope_type=linear or llama3"
            )
        if config.rope_type == "llama3" and config.rope_low_freq_factor >= config.rope_high_freq_factor:
            raise ValueError(
                f"model.rope_low_freq_factor={config.rope_low_freq_factor:g} is not below "
                f"model.rope_high_freq_factor={config.rope_high_freq_factor:g}: change one of them"
            )

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """Each rank has some heads; key and value heads, where there are fewer than ranks, are replicated."""

        def heads(axis: int, count: int, key: str, is_replicable: bool = False) -> tuple[ShardSpec, ...]:
            block = Block(count * config.resolved_head_dim, units=count)
            return (ShardSpec(axis, "tensor", (block,), key, is_replicable),)

        query = heads(0, config.heads, "model.heads")
        key_value = heads(0, config.resolved_kv_heads, "model.kv_heads", is_replicable=True)
        inputs = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
        specs = {f"{name}.{part}": spec for name, spec in inputs.items() for part in ("weight", "bias")}
        return specs | {"o_proj.weight": heads(1, config.heads, "model.heads")}

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """See ``Mixer``; key and value heads, where there are fewer than ranks, are on several."""
        tokens, d_model, head_dim = share.tokens, config.d_model, config.resolved_head_dim
        x = enter(tape, x, share, d_model, joins)
        heads = config.heads // share.tensor
        query, key = heads * head_dim, max(1, config.resolved_kv_heads // share.tensor) * head_dim
        made = [tape.linear(x, tokens, d_model, size) for size in (query, key, key)]
        if config.positions == "rope":
            made[:2] = [
                cls._record_rotated(tape, one, tokens * size) for one, size in zip(made[:2], (query, key), strict=True)
            ]
        sums = tape.tensor(tokens * heads, FP32)
        y, mask = tape.tensor(tokens * query), tape.tensor(cls._masked(config, share))
        if tape.fused and tape.width >= FP32 and query != key:  # no kernel of GPUs takes both: it is written down
            pairs, wide = tape.tensor(tokens * heads * share.length), tape.tensor(3 * tokens * query)
            tape.do(made, (y,), (wide, pairs, mask), forward=pairs.bytes, backward=2 * pairs.bytes)
        else:
            tape.do(made, (y,), (*made, y, sums, mask))
        if config.positions == "rope":  # it lies as rotated queries do, head by head, and is copied
            copy = tape.tensor(tokens * query)
            tape.do((y,), (copy,), gradient="handed")
            y = copy
        return leave(tape, tape.linear(y, tokens, query, d_model), share, d_model, joins)

    @classmethod
    def _record_rotated(cls, tape: Tape, x: Recorded, numbers: int) -> Recorded:
        """Products with cosines and sines in fp32; each half's gradient is a sum of two."""
        scratch = (3 if tape.width < FP32 else 1) * numbers * FP32
        return tape.one(x, numbers=numbers, forward=scratch, backward=scratch)

    @classmethod
    def _masked(cls, config: ModelConfig, share: Share) -> int:
        """Numbers of a mask: (length, length) for each sequence of documents, or for a window; 0: plain causal."""
        if share.resets:
            return share.batch * share.length**2
        return share.length**2 if share.length > (config.sliding_window or share.length) else 0

    @classmethod
    def _seen(cls, config: ModelConfig, length: int) -> int:
        """Twice the keys that all tokens of a sequence see together."""
        window = min(config.sliding_window or length, length)
        return 2 * window * length - window**2

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """See ``Mixer``; key and value heads, where there are fewer than ranks, are on several."""
        head_dim, tokens = config.resolved_head_dim, share.tokens
        query = config.heads // share.tensor * head_dim
        key = max(1, config.resolved_kv_heads // share.tensor) * head_dim
        seen = cls._seen(config, share.length)
        size = tokens * (2 * query + 2 * key) * share.width
        rotated = tokens * (query + key) * share.width if config.positions == "rope" else 0
        return [
            Product(tokens, config.d_model, query),
            Product(tokens, config.d_model, key),
            Product(tokens, config.d_model, key),
            Pass(6 * rotated, 6 * rotated, 16 if rotated else 4),
            Attended(2 * seen * share.batch * query, size),
            Product(tokens, query, config.d_model),
        ]

    def flops_per_token(self, length: int) -> int:
        """The matrices' and 6 x length x heads x head_dim: queries with keys, weights with values, half of them masked.

        With a sliding window of w < length tokens, 2 w - w^2 / length in the place of length.
        """
        seen = self._seen(self.config, length)
        products = 6 * seen * self.config.heads * self.head_dim // length
        return super().flops_per_token(length) + products
