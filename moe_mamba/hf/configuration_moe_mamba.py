# SPDX-License-Identifier: Apache-2.0
"""Configuration of a model that moe_mamba trained, as Transformers keeps it.

Assembled from the source of the package moe_mamba by tools/assemble_hf.py: change it there, not here. Where a docstring
names one of its modules, more stands there; nothing of it is needed.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Optional, Union

import transformers
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

OLDEST, NEWEST = "4.57", "5.24"  # versions of Transformers that this was tested with

installed = tuple(map(int, transformers.__version__.split(".")[:2]))
SHARDS_TENSORS = installed >= (5, 23)  # as ``base_model_tp_plan`` says: older ones shard otherwise

if installed < tuple(map(int, OLDEST.split(".")[:2])):
    raise ImportError(f"MoEMamba needs transformers {OLDEST} to {NEWEST}, and {transformers.__version__} is installed")


logger = logging.get_logger(__name__)

KEPT = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
    "trust_remote_code",
}
"""Keys that Transformers keeps in some configurations and versions, and that are none of the model's."""


@strict
@dataclass(kw_only=True)
class InnerConfig:
    """Mixtures inside Mamba mixers: what ``MoEMambaConfig.moe`` holds under ``inner``.

    Args:
        projections: Mamba: projections with experts, any of conv,gate,out.
        every: Mamba layers that have them: 1 all, 2 the second, fourth, ....
        router: each projection has its router, on its own input; or one for all, on the mixer's input.
        expert: an expert is one matrix; or two with the activation between them, of width d_expert.
        experts: experts per projection; null: moe.experts.
        d_expert: switch: hidden width of an expert; null: as moe.d_expert.
        top_k: experts per token; null: moe.top_k.
        capacity_factor: as moe.capacity_factor, where what is dropped gets zero; null: dropless.
        balance: how the experts' load is kept even; null: moe.balance.
    """

    projections: list[Literal["conv", "gate", "out"]] = field(default_factory=list)
    every: int = 1
    router: Literal["own", "shared"] = "own"
    expert: Literal["linear", "switch"] = "linear"
    experts: Optional[int] = None
    d_expert: Optional[int] = None
    top_k: Optional[int] = None
    capacity_factor: Optional[Union[float, int]] = None
    balance: Optional[Literal["loss", "bias", "none"]] = None

    def __post_init__(self) -> None:
        if len(set(self.projections)) < len(self.projections):
            raise ValueError(f"moe.inner.projections={','.join(self.projections)} names one twice: name it once")
        if not self.projections:
            plain = {"every": 1, "router": "own", "expert": "linear"}
            for name in ("every", "router", "expert", "experts", "d_expert", "top_k", "capacity_factor", "balance"):
                if getattr(self, name) != plain.get(name):
                    raise ValueError(
                        f"moe.inner.{name}={getattr(self, name)} without moe.inner.projections: name those that have "
                        "experts, such as conv,gate,out, or leave it out"
                    )
        if self.d_expert is not None and self.expert == "linear":
            raise ValueError(
                f"moe.inner.d_expert={self.d_expert} with moe.inner.expert=linear, which has no hidden width: set "
                "moe.inner.expert=switch, or leave it out"
            )
        if self.router == "shared" and self.projections and "out" not in self.projections:
            raise ValueError(
                f"moe.inner.router=shared with moe.inner.projections={','.join(self.projections)}: only the output is "
                "weighted by a shared router, which would not learn without it: add out, or set moe.inner.router=own"
            )


@strict
@dataclass(kw_only=True)
class MoEConfig:
    """Routing and experts of the layers written ``E``: what ``MoEMambaConfig.moe`` holds, as a dictionary.

    Args:
        experts: routed experts per layer.
        d_expert: hidden width of an expert; null: model.d_ff's value.
        router: switch: the best expert per token; top_k: several; expert_choice: experts choose tokens.
        top_k: experts per token (top_k), or on average (expert_choice).
        scores: how router logits become scores.
        renormalize: the weights of a token's chosen experts sum to one (top_k > 1).
        capacity_factor: tokens an expert takes, in units of an even share, the rest is dropped; null: dropless.
        evaluation_capacity: capacity factor of evaluation and generation; null: dropless.
        balance: how the experts' load is kept even.
        balance_weight: weight of the balance loss (balance=loss).
        balance_over: whose tokens the balance and z losses of a micro-step are taken over: all devices', or each's.
        bias_rate: step of the balancing bias, per update (balance=bias).
        z_loss_weight: weight of the router's z-loss; 0: none.
        shared_experts: experts that see every token, beside the routed ones.
        inner: mixtures inside Mamba mixers.
    """

    experts: int = 32
    d_expert: Optional[int] = None
    router: Literal["switch", "top_k", "expert_choice"] = "switch"
    top_k: int = 1
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    capacity_factor: Optional[Union[float, int]] = 1.0
    evaluation_capacity: Optional[Union[float, int]] = None
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: Union[float, int] = 0.01
    balance_over: Literal["all", "device"] = "all"
    bias_rate: Union[float, int] = 0.001
    z_loss_weight: Union[float, int] = 0.0
    shared_experts: int = 0
    inner: InnerConfig = field(default_factory=InnerConfig)

    @classmethod
    def of(cls, moe: dict[str, Any]) -> "MoEConfig":
        """What a dictionary says, with one under ``inner``."""
        return cls(**moe | {"inner": InnerConfig(**moe.get("inner", {}))})  # type: ignore[call-arg]  # assembled

    @property
    def inner_routing(self) -> "MoEConfig":
        """How the routers inside Mamba mixers route: by token, whatever ``router`` says of the layers ``E``."""
        inner = self.inner
        top_k = inner.top_k or self.top_k
        return MoEConfig(
            **vars(self)
            | {
                "experts": inner.experts or self.experts,
                "d_expert": inner.d_expert or self.d_expert,
                "router": "switch" if top_k == 1 else "top_k",
                "top_k": top_k,
                "renormalize": self.renormalize and top_k > 1,
                "capacity_factor": inner.capacity_factor,
                "evaluation_capacity": None,
                "balance": inner.balance or self.balance,
                "shared_experts": 0,
                "inner": InnerConfig(),
            }
        )

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ValueError(f"moe.top_k={self.top_k} exceeds moe.experts={self.experts}: lower moe.top_k")
        if self.router == "switch" and self.top_k != 1:
            raise ValueError(f"moe.top_k={self.top_k} with moe.router=switch, which is top-1: set moe.router=top_k")
        if self.renormalize and self.router != "top_k":
            raise ValueError(f"moe.renormalize=true is for moe.router=top_k, not {self.router}: set it to false")
        if self.renormalize and self.top_k == 1:
            raise ValueError("moe.renormalize=true with moe.top_k=1 gives the router no gradient: set it to false")
        if self.router == "expert_choice":
            if self.capacity_factor is None:
                raise ValueError(
                    "moe.capacity_factor=null with moe.router=expert_choice, whose experts choose by capacity: set 1.0"
                )
            if self.balance == "bias":
                raise ValueError(
                    "moe.balance=bias with moe.router=expert_choice, which is balanced by itself: set moe.balance=none"
                )
        if self.inner.projections:
            experts, top_k = self.inner.experts or self.experts, self.inner.top_k or self.top_k
            if top_k > experts:
                raise ValueError(
                    f"moe.inner.top_k={top_k} exceeds moe.inner.experts={experts}: lower it (null: as in moe)"
                )


@strict
@dataclass(kw_only=True)
class StackConfig:
    """The residual stack, a letter per layer, and its sizes: what ``MoEMambaConfig`` holds of it, and derives.

    Args:
        pattern: one letter per layer: M Mamba, * attention, - feed-forward, E experts; (ME): they read one input.
        repeat: how often the pattern is repeated.
        d_model: width of the residual stream.
        vocab_size: tokens the embedding and the head know; null in a run's config: the tokenizer's size.
        d_state: Mamba: states a channel.
        d_conv: Mamba: width of the causal convolution, tokens.
        expand: Mamba: d_inner = expand x d_model.
        d_inner: Mamba: channels inside the mixer; null: expand x d_model.
        dt_rank: Mamba: rank of delta's projection; null: ceil(d_model / 16).
        selective: Mamba: delta, B and C depend on the input; false: they are constants.
        mamba_norms: Mamba: RMSNorm on dt, B and C, as Jamba has it.
        heads: attention: query heads.
        kv_heads: attention: key and value heads; null: as many as heads.
        positions: attention: rotary positions, or none.
        head_dim: attention: width of a head; null: d_model / heads.
        sliding_window: attention: tokens that a token sees, itself included; null: all before it.
        attention_bias: attention: biases on its four projections.
        rope_base: attention: base of the rotary frequencies.
        rope_type: attention: scaling of the rotary frequencies: none, all, or the low ones.
        rope_factor: linear, llama3: what scaled frequencies are divided by.
        rope_original_length: llama3: context before the scaling, tokens.
        rope_low_freq_factor: llama3: frequencies of at most so many turns in that context are scaled.
        rope_high_freq_factor: llama3: frequencies of at least so many turns are left; in between is a blend.
        d_ff: feed-forward: hidden width; null: 3 x d_model, 4 with attention.
        mlp_bias: feed-forward: biases on both projections; experts have none.
        activation: feed-forward and experts: activation; swiglu is gated.
        norm: normalisation before every layer.
        norm_epsilon: added to the variance in a norm.
        final_norm: a norm between the last layer and the head.
        tied_head: the head is the embedding, transposed.
        initialization: authors: truncated normal of std sqrt(0.1 / fan_in), as the paper's code has it.
    """

    pattern: str = "ME"
    repeat: int = 8
    d_model: int = 512
    vocab_size: int = 2048
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    d_inner: Optional[int] = None
    dt_rank: Optional[int] = None
    selective: bool = True
    mamba_norms: bool = False
    heads: int = 8
    kv_heads: Optional[int] = None
    positions: Literal["rope", "none"] = "rope"
    head_dim: Optional[int] = None
    sliding_window: Optional[int] = None
    attention_bias: bool = False
    rope_base: Union[float, int] = 10000.0
    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_factor: Union[float, int] = 1.0
    rope_original_length: int = 8192
    rope_low_freq_factor: Union[float, int] = 1.0
    rope_high_freq_factor: Union[float, int] = 4.0
    d_ff: Optional[int] = None
    mlp_bias: bool = False
    activation: Literal["relu", "squared_relu", "gelu", "swiglu"] = "relu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: Union[float, int] = 1e-5
    final_norm: bool = True
    tied_head: bool = False
    initialization: Literal["default", "authors"] = "default"

    @property
    def layers(self) -> list[str]:
        """The letters of each layer, for the whole model: more than one where several mixers read one input."""
        layers: list[str] = []
        is_inside = False
        for letter in self.pattern:
            if letter in "()":
                is_inside = letter == "("
                layers += [""] * is_inside
            elif is_inside:
                layers[-1] += letter
            else:
                layers.append(letter)
        return layers * self.repeat

    @property
    def updates(self) -> int:
        """Outputs of mixers that are added to the residual stream, one after the other or together."""
        return sum(map(len, self.layers))

    @property
    def resolved_d_inner(self) -> int:
        """Channels inside a Mamba mixer."""
        return self.d_inner or self.expand * self.d_model

    @property
    def d_inner_key(self) -> str:
        """The key that says how many channels there are inside a Mamba mixer, as messages name it."""
        return "model.expand x model.d_model" if self.d_inner is None else "model.d_inner"

    @property
    def resolved_dt_rank(self) -> int:
        """Rank of delta's projection."""
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.heads

    @property
    def resolved_d_ff(self) -> int:
        """Hidden width of feed-forward layers and, by default, of experts (the paper's 3 d beside Mamba, else 4 d)."""
        return self.d_ff or (4 if "*" in self.pattern else 3) * self.d_model

    def __post_init__(self) -> None:
        if self.expand != 2 and self.resolved_d_inner != self.expand * self.d_model:
            raise ValueError(
                f"model.expand={self.expand} with model.d_inner={self.d_inner}, which is not {self.expand} x "
                f"model.d_model={self.d_model}: leave one of them out"
            )

    @property
    def _attn_implementation(self) -> str | None:
        """What the whole configuration says: Transformers' users look for it at each module's ``config``."""
        return getattr(vars(self).get("whole"), "_attn_implementation", None)

    @property
    def _experts_implementation(self) -> str | None:
        """As ``_attn_implementation``; Transformers 4 has none."""
        return getattr(vars(self).get("whole"), "_experts_implementation", None)


class MoEMambaConfig(PretrainedConfig):
    """The residual stack, a letter per layer, and its sizes.

    Args:
        moe: routing and experts, keys and defaults as in ``MoEConfig``; under ``inner`` those of ``InnerConfig``.
        use_cache: whether a pass in evaluation returns a cache by default.
        output_router_logits: whether a pass returns them, and the loss has the routers' losses, by default.
        bos_token_id: token that begins a text, if any does.
        eos_token_id: token that ends a text, if any does.
        pad_token_id: token that fills batches.
        kwargs: keys of the stack, with types and defaults as in ``StackConfig``, and what Transformers keeps in any
            configuration.

    Raises:
        ValueError: values that make no model.
    """

    model_type = "moe_mamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tied_head",
    }

    def __init__(
        self,
        moe: dict[str, Any] | None = None,
        use_cache: bool = True,
        output_router_logits: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        stack = StackConfig(**{key.name: kwargs.pop(key.name) for key in fields(StackConfig) if key.name in kwargs})
        for key in fields(StackConfig):
            setattr(self, key.name, getattr(stack, key.name))
        self.moe = asdict(MoEConfig.of(moe or {}))
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        own = PretrainedConfig()
        if unknown := [name for name in kwargs if not (name.startswith("_") or name in KEPT or hasattr(own, name))]:
            logger.warning(f"MoEMambaConfig knows no {', '.join(unknown)}: nothing reads what is said there")
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs, tie_word_embeddings=self.tied_head)  # type: ignore[call-arg]  # 4.57 has a default

    @property
    def stack(self) -> StackConfig:
        """The keys of the stack as they are now, checked, and what follows from them."""
        stack = StackConfig(**{key.name: getattr(self, key.name) for key in fields(StackConfig)})
        vars(stack)["whole"] = self
        return stack

    @property
    def routing(self) -> Any:
        """The keys of ``moe`` as they are now, checked, and what follows from them."""
        return MoEConfig.of(self.moe)

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]  # others' are the same for all
        """What tensor parallelism shards -> how, in Transformers' words; None for versions before 5.23.

        Mamba layers are replicated, their experts among them. So is a feed-forward layer beside them, since a plan
        cannot tell its projections from theirs, and one with biases of gates: Transformers gives a rank the biases of
        other columns.
        """
        if not SHARDS_TENSORS:
            return None
        gated = self.activation == "swiglu"
        columns, last_axis = ("packed_colwise", "packed_rowwise") if gated else ("colwise", "rowwise")
        plan = {"embedding": "embedding_rowwise"}
        alone = "".join(letters for letters in self.layers if len(letters) == 1)
        beside = "".join(letters for letters in self.layers if len(letters) > 1)
        for mixer, letters in (("layers.*.mixer", alone), ("layers.*.mixer.*", beside)):
            if "*" in letters:
                plan |= {f"{mixer}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
                plan |= {f"{mixer}.o_proj": "rowwise"}
            if "-" in letters and "M" not in letters and not (gated and self.mlp_bias):
                plan |= {f"{mixer}.in_proj": columns, f"{mixer}.out_proj": "rowwise"}
            if "E" in letters:  # (experts, in, out): the axis before the last is Transformers' first of a matrix
                plan |= {f"{mixer}.experts.in_proj": last_axis, f"{mixer}.experts.out_proj": "colwise"}
                plan |= {f"{mixer}.experts": "moe_tp_experts"}
                if self.moe["shared_experts"]:
                    plan |= {f"{mixer}.shared.in_proj": columns, f"{mixer}.shared.out_proj": "rowwise"}
        return plan

    @property
    def layers(self) -> list[str]:
        """The letters of each layer, for the whole model."""
        return self.stack.layers  # type: ignore[attr-defined]  # assembled

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the whole pattern."""
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """Routed experts per layer ``E``, as Mixtral's users ask for them; without one, per projection inside Mamba."""
        return self._routings[0].experts

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts per token, of those that ``num_experts`` counts."""
        return self._routings[0].top_k

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the balance loss; 0 where no router has one. Who trains may set it, as TRL does."""
        return self.moe["balance_weight"] if any(moe.balance == "loss" for moe in self._routings) else 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, weight: float) -> None:
        if weight == self.router_aux_loss_coef:
            return
        if all(moe.balance != "loss" for moe in self._routings):
            balance = self._routings[0].balance
            raise ValueError(f"router_aux_loss_coef={weight} with moe.balance={balance}, which has no loss")
        self.moe["balance_weight"] = weight

    @property
    def _routings(self) -> list[Any]:
        """How the layers ``E`` route, and how routers inside Mamba do, of those that there are.

        Raises:
            AttributeError: there are none, as ``hasattr`` shall say.
        """
        moe, letters = self.routing, "".join(self.layers)
        inside = moe.inner.projections and letters.count("M") >= moe.inner.every
        routings = [moe] * ("E" in letters) + ([moe.inner_routing] if inside else [])
        if not routings:
            raise AttributeError(f"a model of pattern {self.pattern} has no experts")
        return routings


MoEMambaConfig.register_for_auto_class()  # save_pretrained writes this file, too
