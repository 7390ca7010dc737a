"""What a model is: the residual stack, and the routing of its experts; ``config.py`` has the rest of a run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_mamba.config_types import (
    NonNegativeFloat,
    OptionalBalance,
    OptionalFactor,
    Projections,
    Range,
    Section,
    Text,
    VocabularySize,
)


class ModelConfig(Section):
    """The residual stack. A letter per layer, as Megatron-LM and Nemotron-H write patterns."""

    pattern: Text = Field(
        "ME",
        description="one letter per layer: M Mamba, * attention, - feed-forward, E experts; (ME): they read one input",
    )
    repeat: Annotated[int, Range(1, 4096)] = Field(8, description="how often the pattern is repeated")
    d_model: Annotated[int, Range(1, 131_072)] = Field(512, description="width of the residual stream")
    vocab_size: VocabularySize = Field(
        2048, description="tokens the embedding and the head know; null in a run's config: the tokenizer's size"
    )
    d_state: Annotated[int, Range(1, 4096)] = Field(16, description="Mamba: states a channel")
    d_conv: Annotated[int, Range(1, 1024)] = Field(4, description="Mamba: width of the causal convolution, tokens")
    expand: Annotated[int, Range(1, 64)] = Field(2, description="Mamba: d_inner = expand x d_model")
    d_inner: Annotated[int | None, Range(1, 2**23)] = Field(
        None, description="Mamba: channels inside the mixer; null: expand x d_model"
    )
    dt_rank: Annotated[int | None, Range(1, 131_072)] = Field(
        None, description="Mamba: rank of delta's projection; null: ceil(d_model / 16)"
    )
    selective: bool = Field(True, description="Mamba: delta, B and C depend on the input; false: they are constants")
    mamba_norms: bool = Field(False, description="Mamba: RMSNorm on dt, B and C, as Jamba has it")
    heads: Annotated[int, Range(1, 8192)] = Field(8, description="attention: query heads")
    kv_heads: Annotated[int | None, Range(1, 8192)] = Field(
        None, description="attention: key and value heads; null: as many as heads"
    )
    positions: Literal["rope", "none"] = Field("rope", description="attention: rotary positions, or none")
    head_dim: Annotated[int | None, Range(1, 8192)] = Field(
        None, description="attention: width of a head; null: d_model / heads"
    )
    sliding_window: Annotated[int | None, Range(1, 2**30)] = Field(
        None, description="attention: tokens that a token sees, itself included; null: all before it"
    )
    attention_bias: bool = Field(False, description="attention: biases on its four projections")
    rope_base: Annotated[float, Range(1, 1e15)] = Field(
        10000.0, description="attention: base of the rotary frequencies"
    )
    rope_type: Literal["default", "linear", "llama3"] = Field(
        "default", description="attention: scaling of the rotary frequencies: none, all, or the low ones"
    )
    rope_factor: Annotated[float, Range(1e-6, 1e6)] = Field(
        1.0, description="linear, llama3: what scaled frequencies are divided by"
    )
    rope_original_length: Annotated[int, Range(1, 2**30)] = Field(
        8192, description="llama3: context before the scaling, tokens"
    )
    rope_low_freq_factor: Annotated[float, Range(1e-6, 1e6)] = Field(
        1.0, description="llama3: frequencies of at most so many turns in that context are scaled"
    )
    rope_high_freq_factor: Annotated[float, Range(1e-6, 1e6)] = Field(
        4.0, description="llama3: frequencies of at least so many turns are left; in between is a blend"
    )
    d_ff: Annotated[int | None, Range(1, 2**20)] = Field(
        None, description="feed-forward: hidden width; null: 3 x d_model, 4 with attention"
    )
    mlp_bias: bool = Field(False, description="feed-forward: biases on both projections; experts have none")
    activation: Literal["relu", "squared_relu", "gelu", "swiglu"] = Field(
        "relu", description="feed-forward and experts: activation; swiglu is gated"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation before every layer")
    norm_epsilon: Annotated[float, Range(1e-30, 1)] = Field(1e-5, description="added to the variance in a norm")
    final_norm: bool = Field(True, description="a norm between the last layer and the head")
    tied_head: bool = Field(False, description="the head is the embedding, transposed")
    initialization: Literal["default", "authors"] = Field(
        "default", description="authors: truncated normal of std sqrt(0.1 / fan_in), as the paper's code has it"
    )

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

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.expand != 2 and self.resolved_d_inner != self.expand * self.d_model:
            raise ValueError(
                f"model.expand={self.expand} with model.d_inner={self.d_inner}, which is not {self.expand} x "
                f"model.d_model={self.d_model}: leave one of them out"
            )
        return self


class InnerConfig(Section):
    """Mixtures inside Mamba mixers: projections that are routed, each token's by its experts; none by default.

    What is null is as in the section around it, and so is what has no key here, but for capacities: null is dropless,
    and evaluation always is.
    """

    projections: Projections = Field([], description="Mamba: projections with experts, any of conv,gate,out")
    every: Annotated[int, Range(1, 4096)] = Field(
        1, description="Mamba layers that have them: 1 all, 2 the second, fourth, ..."
    )
    router: Literal["own", "shared"] = Field(
        "own", description="each projection has its router, on its own input; or one for all, on the mixer's input"
    )
    expert: Literal["linear", "switch"] = Field(
        "linear", description="an expert is one matrix; or two with the activation between them, of width d_expert"
    )
    experts: Annotated[int | None, Range(1, 65_536)] = Field(
        None, description="experts per projection; null: moe.experts"
    )
    d_expert: Annotated[int | None, Range(1, 2**20)] = Field(
        None, description="switch: hidden width of an expert; null: as moe.d_expert"
    )
    top_k: Annotated[int | None, Range(1, 65_536)] = Field(None, description="experts per token; null: moe.top_k")
    capacity_factor: OptionalFactor = Field(
        None, description="as moe.capacity_factor, where what is dropped gets zero; null: dropless"
    )
    balance: OptionalBalance = Field(None, description="how the experts' load is kept even; null: moe.balance")

    @model_validator(mode="after")
    def _check(self) -> "InnerConfig":
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
        return self


class MoEConfig(Section):
    """Routing and experts of the layers written ``E``."""

    experts: Annotated[int, Range(1, 65_536)] = Field(32, description="routed experts per layer")
    d_expert: Annotated[int | None, Range(1, 2**20)] = Field(
        None, description="hidden width of an expert; null: model.d_ff's value"
    )
    router: Literal["switch", "top_k", "expert_choice"] = Field(
        "switch", description="switch: the best expert per token; top_k: several; expert_choice: experts choose tokens"
    )
    top_k: Annotated[int, Range(1, 65_536)] = Field(
        1, description="experts per token (top_k), or on average (expert_choice)"
    )
    scores: Literal["softmax", "sigmoid"] = Field("softmax", description="how router logits become scores")
    renormalize: bool = Field(False, description="the weights of a token's chosen experts sum to one (top_k > 1)")
    capacity_factor: OptionalFactor = Field(
        1.0, description="tokens an expert takes, in units of an even share, the rest is dropped; null: dropless"
    )
    evaluation_capacity: OptionalFactor = Field(
        None, description="capacity factor of evaluation and generation; null: dropless"
    )
    balance: Literal["loss", "bias", "none"] = Field("loss", description="how the experts' load is kept even")
    balance_weight: NonNegativeFloat = Field(0.01, description="weight of the balance loss (balance=loss)")
    balance_over: Literal["all", "device"] = Field(
        "all",
        description="whose tokens the balance and z losses of a micro-step are taken over: all devices', or each's",
    )
    bias_rate: NonNegativeFloat = Field(0.001, description="step of the balancing bias, per update (balance=bias)")
    z_loss_weight: NonNegativeFloat = Field(0.0, description="weight of the router's z-loss; 0: none")
    shared_experts: Annotated[int, Range(0, 4096)] = Field(
        0, description="experts that see every token, beside the routed ones"
    )
    inner: InnerConfig = Field(InnerConfig(), description="mixtures inside Mamba mixers")

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

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
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
        return self
