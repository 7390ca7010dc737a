"""The typed configuration: every key, its default, its unit and its meaning.

One tree of pydantic models; unknown keys and combinations that cannot work are refused with one line that names the
key and the mend. How a tree is read from files and command lines stands in config_file.py.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _none_from_text(value: object) -> object:
    """Read ``null`` and ``none`` from a command line as no value."""
    return None if isinstance(value, str) and value.lower() in ("null", "none", "") else value


def _structure_from_text(value: object) -> object:
    """Read JSON lists and objects, and ``a,b``, from a command line."""
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"begins with {value[0]} but is not JSON ({error}): mend it, or write a,b") from None
    return [part for part in value.split(",") if part]


Text = Annotated[str, BeforeValidator(lambda value: value if value is None else str(value))]
OptionalPositive = Annotated[Positive | None, BeforeValidator(_none_from_text)]
OptionalFactor = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(_none_from_text)]
Sources = Annotated[dict[str, float] | dict[str, str] | list[str], BeforeValidator(_structure_from_text)]

PATTERN_LETTERS = {"M": "Mamba", "*": "attention", "-": "feed-forward", "E": "mixture of experts"}


class Section(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunConfig(Section):
    """Where the run lies, and the seed that all its randomness comes from."""

    folder: Text = Field("runs/default", description="folder of the run; the same folder again resumes it")
    seed: NonNegative = Field(0, description="seed of the weights and of the order of the data")


class ModelConfig(Section):
    """The residual stack. A letter a layer, as Megatron-LM and Nemotron-H write patterns."""

    pattern: Text = Field("ME", description="one letter a layer: M Mamba, * attention, - feed-forward, E experts")
    repeat: Positive = Field(8, description="how often the pattern is repeated")
    d_model: Positive = Field(512, description="width of the residual stream")
    vocab_size: Positive = Field(2048, description="tokens the embedding and the head know")
    d_state: Positive = Field(16, description="Mamba: states a channel")
    d_conv: Positive = Field(4, description="Mamba: width of the causal convolution, tokens")
    expand: Positive = Field(2, description="Mamba: d_inner = expand x d_model")
    dt_rank: OptionalPositive = Field(None, description="Mamba: rank of delta's projection; null: ceil(d_model / 16)")
    selective: bool = Field(True, description="Mamba: delta, B and C depend on the input; false: they are constants")
    mamba_norms: bool = Field(False, description="Mamba: RMSNorm on dt, B and C, as Jamba has it")
    heads: Positive = Field(8, description="attention: query heads")
    kv_heads: OptionalPositive = Field(None, description="attention: key and value heads; null: as many as heads")
    positions: Literal["rope", "none"] = Field("rope", description="attention: rotary positions, or none")
    rope_base: Annotated[float, Field(gt=0)] = Field(10000.0, description="attention: base of the rotary frequencies")
    d_ff: OptionalPositive = Field(None, description="feed-forward: hidden width; null: 3 x d_model, 4 with attention")
    activation: Literal["relu", "squared_relu", "gelu", "swiglu"] = Field(
        "relu", description="feed-forward and experts: activation; swiglu is gated"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation before every layer")
    norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="added to the variance in a norm")
    final_norm: bool = Field(True, description="a norm between the last layer and the head")
    tied_head: bool = Field(False, description="the head is the embedding, transposed")
    initialization: Literal["default", "authors"] = Field(
        "default", description="authors: truncated normal of std sqrt(0.1 / fan_in), as the paper's code has it"
    )
    kernels: Literal["auto", "reference", "torch", "cpu", "triton", "vendor"] = Field(
        "auto", description="which kernels, where an operation has them; auto: the fastest; vendor: for training"
    )

    @property
    def layers(self) -> str:
        """One letter a layer, for the whole model."""
        return self.pattern * self.repeat

    @property
    def d_inner(self) -> int:
        """Channels inside a Mamba mixer."""
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        """Rank of delta's projection."""
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def resolved_d_ff(self) -> int:
        """Hidden width of feed-forward layers and, by default, of experts (the paper's 3 d beside Mamba, else 4 d)."""
        return self.d_ff or (4 if "*" in self.pattern else 3) * self.d_model

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if not self.pattern:
            raise ValueError("model.pattern is empty: give one letter a layer, such as ME")
        for letter in self.pattern:
            if letter not in PATTERN_LETTERS:
                known = ", ".join(f"{key} {name}" for key, name in PATTERN_LETTERS.items())
                raise ValueError(f"model.pattern={self.pattern}: unknown letter {letter!r}; known are {known}")
        if "*" in self.pattern:
            if self.d_model % self.heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not divisible by model.heads={self.heads}: change one of them"
                )
            if self.heads % self.resolved_kv_heads:
                raise ValueError(
                    f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}: change one of them"
                )
            if self.positions == "rope" and self.d_model // self.heads % 2:
                raise ValueError(
                    f"model.d_model / model.heads = {self.d_model // self.heads} is odd: "
                    "rotary positions need an even one, or set model.positions=none"
                )
        return self


class MoEConfig(Section):
    """Routing and experts of the layers written ``E``."""

    experts: Positive = Field(32, description="routed experts a layer")
    d_expert: OptionalPositive = Field(None, description="hidden width of an expert; null: model.d_ff's value")
    router: Literal["switch", "top_k", "expert_choice"] = Field(
        "switch", description="switch: the best expert a token; top_k: several; expert_choice: experts choose tokens"
    )
    top_k: Positive = Field(1, description="experts a token (top_k), or on average (expert_choice)")
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
    shared_experts: NonNegative = Field(0, description="experts that see every token, beside the routed ones")

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
        return self


class DataConfig(Section):
    """Corpora, tokenizer, and how windows are cut from them.

    A source is ``builtin`` or ``builtin:validation`` (the English inside CPython), a folder or prefix of shards
    that ``tools/preprocess_c4.py`` wrote, a file or glob of documents (``.txt``, ``.jsonl``, ``.json.gz``,
    ``.parquet``), or a Hugging Face dataset, streamed: ``hf:allenai/c4:en:train``. Or a synthetic task:
    ``synthetic:induction_heads`` or ``synthetic:selective_copying`` (data/synthetic.py has the rules and options).
    """

    train: Sources = Field(["builtin"], description="sources to train on; a mapping gives each its weight")
    validation: Sources = Field(
        {"validation": "builtin:validation"}, description="sources to validate on; a mapping names each set"
    )
    tokenizer: Text = Field(
        "sentencepiece",
        description="gpt2, bytes, a folder, a .model file, symbols (for tasks), or sentencepiece (from data.train)",
    )
    cache: Text = Field("data/cache", description="where shards of sources given as documents are kept")
    verify: bool = Field(True, description="compare every shard with its checksum before the run starts")
    max_documents: OptionalPositive = Field(None, description="documents to take of each source of them; null: all")
    sequence_length: Positive = Field(256, description="tokens a window")
    reset_at_document: bool = Field(
        True, description="state, convolution and attention start anew at each document of a window"
    )

    @property
    def train_weights(self) -> dict[str, float]:
        """Source -> weight; weights sum to one where they are used."""
        if isinstance(self.train, dict):
            return {source: float(weight) for source, weight in self.train.items()}
        return dict.fromkeys(self.train, 1.0)

    @property
    def validation_sets(self) -> dict[str, str]:
        """Name of a validation set -> its source."""
        if isinstance(self.validation, dict):
            return {name: str(source) for name, source in self.validation.items()}
        if len(self.validation) == 1:
            return {"validation": self.validation[0]}
        return {re.sub(r"\W+", "_", source).strip("_"): source for source in self.validation}

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.train:
            raise ValueError("data.train is empty: name at least one source, such as builtin")
        if not self.validation:
            raise ValueError("data.validation is empty: name at least one source, such as builtin:validation")
        if isinstance(self.train, dict):
            for source, weight in self.train.items():
                try:
                    positive = float(weight) > 0
                except ValueError:
                    positive = False
                if not positive:
                    raise ValueError(f"data.train: the weight of {source} is {weight!r}: give a number above 0")
        return self


class TrainConfig(Section):
    """Length, batch, optimizer, schedule, precision, and what is done along the way."""

    steps: OptionalPositive = Field(1000, description="optimizer steps; null: from train.tokens")
    tokens: OptionalPositive = Field(None, description="budget in tokens, instead of train.steps")
    global_batch: Positive = Field(64, description="sequences an optimizer step, over all devices")
    micro_batch: OptionalPositive = Field(None, description="sequences a device works on at once; null: chosen")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="after warm-up: cosine, or stable then decay")
    warmup: Fraction = Field(0.01, description="share of the steps in which the rate rises linearly")
    decay: Fraction = Field(0.2, description="wsd: share of the steps, at the end, in which the rate falls linearly")
    minimum_rate: Fraction = Field(0.1, description="learning rate at the end, as a share of the peak")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's decoupled weight decay")
    decay_all: bool = Field(False, description="decay norms, biases, A_log and D too, as the authors' code does")
    beta1: Fraction = Field(0.9, description="AdamW: decay of the first moment")
    beta2: Fraction = Field(0.95, description="AdamW: decay of the second moment")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW: added to the root of the second moment")
    gradient_clip: NonNegativeFloat = Field(0.5, description="largest norm of the gradient; 0: no clipping")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: weights and compute in bf16; A_log, D, dt_bias, norms and router stay fp32"
    )
    recompute: bool = Field(False, description="keep only each layer's input and compute the rest again in backward")
    compile: bool = Field(False, description="torch.compile each layer (needs a C++ compiler on a CPU)")
    deterministic: bool = Field(False, description="refuse kernels whose result varies from run to run")
    profile: NonNegative = Field(0, description="steps to trace into the run's folder; 0: none")
    validate_every: NonNegative = Field(100, description="steps between validations; 0: at the end alone")
    validation_batches: OptionalPositive = Field(
        None, description="global batches a validation reads; null: the whole set"
    )
    sample_tokens: NonNegative = Field(64, description="tokens of sample text at the end; 0: none")
    warm_start: OptionalText = Field(
        None, description="run or step folder whose weights to start from, optimizer fresh"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("train.steps and train.tokens: give one of them, and null for the other")
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch}: "
                "change one of them"
            )
        return self


class ParallelConfig(Section):
    """How the model and its training are laid over devices: devices = tensor x data; experts over any divisor."""

    tensor: Positive = Field(1, description="devices that share each layer, and the residual stream between layers")
    expert: Positive = Field(1, description="devices over which experts are spread, tensor peers included")
    expert_tensor: bool = Field(False, description="cut each expert among the tensor peers, instead of their tokens")
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO stage: 1 cuts optimizer state, 2 gradients too, 3 weights too (without experts)"
    )
    offload_optimizer: bool = Field(False, description="keep optimizer state in the CPU's memory (zero 1 or more)")
    pipeline: Positive = Field(1, description="pipeline stages: only 1 is built so far")
    context: Positive = Field(1, description="devices that share a sequence: only 1 is built so far")
    timeout: Positive = Field(
        1800, description="seconds for which a rank may stand still, as in a collective that hangs, before the run ends"
    )

    @model_validator(mode="before")
    @classmethod
    def _integer_stage(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("zero", "")).isdigit():
            return values | {"zero": int(values["zero"])}
        return values

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.pipeline != 1:
            raise ValueError(
                f"parallel.pipeline={self.pipeline}: stages are not built yet, for models of this size fit by tensor, "
                "expert and ZeRO without a pipeline's idle time: set parallel.pipeline=1"
            )
        if self.context != 1:
            raise ValueError(
                f"parallel.context={self.context}: a scan's state would have to travel from device to device, which is "
                "not built yet: set parallel.context=1, and parallel.tensor to share long sequences' activations"
            )
        if self.expert_tensor and self.tensor == 1:
            raise ValueError("parallel.expert_tensor=true needs tensor peers: set parallel.tensor to 2 or more")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("parallel.offload_optimizer=true needs ZeRO: set parallel.zero=1")
        return self


class CheckpointConfig(Section):
    """When a run is saved, and what is kept."""

    every: NonNegative = Field(100, description="steps between checkpoints; 0: at the end alone")
    keep: Positive = Field(
        2,
        description="newest checkpoints kept (2 until a step follows the newest); besides, the best by validation loss",
    )
    grace: Positive = Field(
        20, description="seconds to end the step and save in, when SIGTERM asks to stop; launchers kill after 30"
    )
    asynchronous: bool = Field(
        False, description="write while training goes on, from a copy of this process's state in the CPU's memory"
    )


class LoggingConfig(Section):
    """What is written beside metrics.jsonl."""

    every: Positive = Field(1, description="steps between lines of metrics")
    wandb: OptionalText = Field(None, description="Weights & Biases project to log to (offline without a network)")
    tensorboard: bool = Field(False, description="write TensorBoard events into the run's folder")


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return max(1, self.train.tokens // (self.train.global_batch * self.data.sequence_length))

    @model_validator(mode="after")
    def _check(self) -> "Config":
        parallel, has_experts = self.parallel, "E" in self.model.pattern
        if self.train.precision == "bf16" and parallel.zero == 0:
            raise ValueError(
                "train.precision=bf16 with parallel.zero=0 keeps no fp32 masters and trains worse: set parallel.zero=1"
            )
        if parallel.zero == 3 and parallel.tensor > 1 and self.train.precision == "bf16":
            raise ValueError(
                f"parallel.zero=3 with parallel.tensor={parallel.tensor} and train.precision=bf16: DeepSpeed keeps the "
                "weights in fp32, and megatron-core's layers do not cast them: set parallel.zero=2"
            )
        if parallel.zero == 3 and self.train.compile:
            raise ValueError("parallel.zero=3 with train.compile=true: its hooks break graphs: set train.compile=false")
        if parallel.zero == 3 and has_experts:
            raise ValueError(
                f"parallel.zero=3 with model.pattern={self.model.pattern}: DeepSpeed cannot cut the weights of experts "
                "by ZeRO-3: set parallel.zero=2, and parallel.expert to spread the experts"
            )
        if parallel.expert > 1 and not has_experts:
            raise ValueError(
                f"parallel.expert={parallel.expert} with model.pattern={self.model.pattern}, which has no experts: "
                "set parallel.expert=1"
            )
        return self
