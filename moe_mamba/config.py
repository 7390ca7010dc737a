"""The typed configuration: every key, its default, its unit and its meaning.

One tree of pydantic models; unknown keys and combinations that cannot work are refused with one line that names the
key and the fix. How a tree is read from files and command lines stands in config_file.py.
"""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from moe_mamba.config_model import InnerConfig, ModelConfig, MoEConfig
from moe_mamba.config_types import (
    DEVICES,
    FilledText,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Numbers,
    OptionalPath,
    OptionalPositive,
    OptionalText,
    PathText,
    Positive,
    Projections,
    Range,
    Section,
    Seed,
    TrainingSources,
    ValidationSources,
    whole_from_text,
)
from moe_mamba.errors import shown

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "InnerConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "Projections",
    "RunConfig",
    "TrainConfig",
]


MOST_SEQUENCES = 2**42  # of a run: the order of the data counts them in 43 bits


class RunConfig(Section):
    """Where the run lies, and the seed that all its randomness comes from."""

    folder: PathText = Field("runs/default", description="folder of the run; the same folder again resumes it")
    seed: Seed = Field(0, description="seed of the weights and of the order of the data")
    kernels: Literal["auto", "reference", "torch", "cpu", "triton", "vendor"] = Field(
        "auto", description="which kernels, where an operation has them; auto: the fastest; vendor: for training"
    )


class DataConfig(Section):
    """Corpora, tokenizer, and how windows are sharded from them.

    A source is ``builtin`` or ``builtin:validation`` (the English inside CPython), a folder or prefix of shards
    that ``tools/preprocess_c4.py`` wrote, a file or glob of documents (``.txt``, ``.jsonl``, ``.json.gz``,
    ``.parquet``), or a Hugging Face dataset, streamed: ``hf:allenai/c4:en:train``. Or a synthetic task:
    ``synthetic:induction_heads`` or ``synthetic:selective_copying`` (data/synthetic.py has the rules and options).
    """

    train: TrainingSources = Field(["builtin"], description="sources to train on; a mapping gives each its weight")
    validation: ValidationSources = Field(
        {"validation": "builtin:validation"}, description="sources to validate on; a mapping names each set"
    )
    tokenizer: PathText = Field(
        "sentencepiece",
        description="gpt2, bytes, a folder, a .model file, symbols (for tasks), or sentencepiece (from data.train)",
    )
    cache: PathText = Field("data/cache", description="where shards of sources given as documents are kept")
    verify: bool = Field(True, description="compare every shard with its checksum before the run starts")
    max_documents: OptionalPositive = Field(None, description="documents to take of each source of them; null: all")
    text_key: FilledText = Field("text", description="field that holds a document's text, where a source has fields")
    sequence_length: Annotated[int, Range(1, 2**27)] = Field(256, description="tokens per window")
    reset_at_document: bool = Field(
        True, description="state, convolution and attention start anew at each document of a window"
    )

    @property
    def train_weights(self) -> dict[str, float]:
        """Source -> weight; weights sum to one where they are used."""
        if isinstance(self.train, dict):
            return self.train
        return dict.fromkeys(self.train, 1.0)

    @property
    def validation_sets(self) -> dict[str, str]:
        """Name of a validation set -> its source."""
        if isinstance(self.validation, dict):
            return self.validation
        if len(self.validation) == 1:
            return {"validation": self.validation[0]}
        return {_set_name(source): source for source in self.validation}

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.train:
            raise ValueError("data.train is empty: name at least one source, such as builtin")
        if not self.validation:
            raise ValueError("data.validation is empty: name at least one source, such as builtin:validation")
        names: dict[str, str] = {}
        for source in self.validation if isinstance(self.validation, list) else ():
            if (other := names.setdefault(name := _set_name(source), source)) != source:
                raise ValueError(
                    f"data.validation: {shown(other)} and {shown(source)} would both be called {shown(name)}: "
                    'give names, as in {"first": "a.jsonl", "second": "b.jsonl"}'
                )
        return self


def _set_name(source: str) -> str:
    """What a validation set is called that was given no name."""
    return re.sub(r"\W+", "_", source).strip("_") or "validation"


class TrainConfig(Section):
    """Length, batch, optimizer, schedule, precision, and what is done along the way."""

    steps: Annotated[int | None, Range(1, 10**9)] = Field(1000, description="optimizer steps; null: from train.tokens")
    tokens: Annotated[int | None, Range(1, 10**16)] = Field(
        None, description="budget in tokens, instead of train.steps"
    )
    global_batch: Annotated[int, Range(1, 2**22)] = Field(
        64, description="sequences an optimizer step, over all devices"
    )
    micro_batch: Annotated[int | None, Range(1, 2**22)] = Field(
        None, description="sequences that a device processes at once; null: chosen"
    )
    learning_rate: Annotated[float, Range(1e-30, 100)] = Field(1e-3, description="peak learning rate")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="after warm-up: cosine, or stable then decay")
    warmup: Fraction = Field(0.01, description="share of the steps in which the rate rises linearly")
    decay: Fraction = Field(
        0.2, description="wsd: share of the steps, at the end, in which the rate falls linearly; 0: it never falls"
    )
    minimum_rate: Fraction = Field(0.1, description="learning rate at the end, as a share of the peak")
    on_longer_budget: Literal["continue", "rewarm", "as_planned"] = Field(
        "continue",
        description="a resume with more steps: fall on from the rate as it is, rise to the peak again, or take that of "
        "a run planned so long",
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's decoupled weight decay")
    decay_all: bool = Field(False, description="decay norms, biases, A_log and D too, as the authors' code does")
    beta1: Annotated[float, Range(0, 1, is_open=True)] = Field(0.9, description="AdamW: decay of the first moment")
    beta2: Annotated[float, Range(0, 1, is_open=True)] = Field(0.95, description="AdamW: decay of the second moment")
    epsilon: Annotated[float, Range(1e-30, 1)] = Field(
        1e-8, description="AdamW: added to the root of the second moment"
    )
    gradient_clip: Annotated[float, Range(0, 1e15)] = Field(
        0.5, description="largest norm of the gradient; 0: no clipping"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: weights and compute in bf16; A_log, D, dt_bias, norms and router stay fp32"
    )
    recompute: bool = Field(False, description="keep only each layer's input and compute the rest again in backward")
    compile: bool = Field(False, description="torch.compile each layer (needs a C++ compiler on a CPU)")
    deterministic: bool = Field(False, description="refuse kernels whose result varies from run to run")
    profile: Annotated[int, Range(0, 10_000)] = Field(0, description="steps to trace into the run's folder; 0: none")
    validate_every: NonNegative = Field(100, description="steps between validations; 0: only at the end")
    validation_batches: OptionalPositive = Field(
        None, description="global batches a validation reads; null: the whole set"
    )
    sample_tokens: Annotated[int, Range(0, 1_000_000)] = Field(
        64, description="tokens of sample text at the end; 0: none"
    )
    warm_start: OptionalPath = Field(
        None, description="run or step folder whose weights to start from, optimizer fresh"
    )
    on_nan: Literal["stop", "skip", "rewind"] = Field(
        "stop", description="at a loss or gradient of NaN or Inf: end, leave the batch out, or go back to a checkpoint"
    )
    on_spike: Literal["log", "stop", "skip", "rewind"] = Field(
        "log", description="at a loss or gradient norm far above the last ones: note it and go on, or as at NaN"
    )
    spike_window: Annotated[int, Range(8, 1_000_000)] = Field(128, description="steps that a spike is measured against")
    spike_threshold: Annotated[float, Range(1e-6, 1e15)] = Field(
        10.0, description="a spike is above median + this x MAD (median absolute deviation, at least 1% of the median)"
    )
    skip_limit: Positive = Field(10, description="bad batches, within spike_window steps, after which the run ends")
    skip_batches: Numbers = Field([], description="batches to leave out, by number: of the step that would take them")

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either train.steps or train.tokens, and null for the other")
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch}: "
                "change one of them"
            )
        return self


class ParallelConfig(Section):
    """How the model and its training are laid over devices: devices = tensor x data; experts over any divisor."""

    tensor: Annotated[int, Range(1, DEVICES)] = Field(
        1, description="devices that share each layer, and the residual stream between layers"
    )
    expert: Annotated[int, Range(1, DEVICES)] = Field(
        1, description="devices over which experts are spread, tensor-parallel ranks included"
    )
    expert_tensor: bool = Field(
        False, description="shard each expert among the tensor-parallel ranks, instead of their tokens"
    )
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole_from_text)] = Field(
        1, description="ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 weights too (without experts)"
    )
    offload_optimizer: bool = Field(False, description="keep optimizer state in the CPU's memory (zero 1 or more)")
    pipeline: Positive = Field(1, description="pipeline stages: only 1 is built so far")
    context: Positive = Field(1, description="devices that share a sequence: only 1 is built so far")
    timeout: Annotated[int, Range(1, 10**7)] = Field(
        1800, description="seconds for which a rank may stand still, as in a collective that hangs, before the run ends"
    )

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.pipeline != 1:
            raise ValueError(
                f"parallel.pipeline={self.pipeline} is not implemented, because models of this size fit with tensor "
                "and expert parallelism and ZeRO, without a pipeline's idle time: set parallel.pipeline=1"
            )
        if self.context != 1:
            raise ValueError(
                f"parallel.context={self.context} is not implemented, because a scan's state would have to travel "
                "between devices: set parallel.context=1, and parallel.tensor to shard long sequences' activations"
            )
        if self.expert_tensor and self.tensor == 1:
            raise ValueError(
                "parallel.expert_tensor=true needs tensor-parallel ranks: set parallel.tensor to 2 or more"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("parallel.offload_optimizer=true needs ZeRO: set parallel.zero=1")
        return self


class CheckpointConfig(Section):
    """When a run is saved, and what is kept."""

    every: NonNegative = Field(100, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(
        2,
        description="newest checkpoints kept (2 until a step follows the newest); besides, the best by validation loss",
    )
    grace: Annotated[int, Range(1, 10**7)] = Field(
        20,
        description="seconds to end the steps under way and save in, if SIGTERM asks to stop; launchers kill after 30",
    )
    asynchronous: bool = Field(
        False, description="write while training goes on, from a copy of this process's state in the CPU's memory"
    )


class LoggingConfig(Section):
    """What is written beside metrics.jsonl."""

    every: Positive = Field(1, description="steps between lines of metrics")
    wandb: OptionalText = Field(None, description="Weights & Biases project to log to (offline without a network)")
    tensorboard: bool = Field(False, description="write TensorBoard events into the run's folder")
    plots: bool = Field(True, description="draw the curves when the run is finished")


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

    @property
    def has_vocabulary(self) -> bool:
        """Whether ``model.vocab_size`` is a number, as every model wants it."""
        return self.model.vocab_size is not None

    def with_vocabulary(self, vocab_size: int) -> "Config":
        """The same with another ``model.vocab_size``."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})

    @model_validator(mode="after")
    def _check(self) -> "Config":
        parallel = self.parallel
        if not self.has_vocabulary and self.data.tokenizer in ("sentencepiece", "symbols"):
            raise ValueError(
                f"model.vocab_size=null with data.tokenizer={self.data.tokenizer}, which has as many tokens as "
                "model.vocab_size says: give it a number"
            )
        if self.steps * self.train.global_batch > MOST_SEQUENCES:
            raise ValueError(
                f"{'train.steps' if self.train.steps else 'train.tokens'} makes {self.steps:,} steps of "
                f"train.global_batch={self.train.global_batch:,} sequences: a run has at most {MOST_SEQUENCES:,} "
                "sequences: lower one of them"
            )
        skipped = sorted(set(self.train.skip_batches))
        if skipped and skipped[-1] > (last := self.steps + len(skipped)):
            raise ValueError(
                f"train.skip_batches names batch {skipped[-1]}, but a run of {self.steps} steps that leaves out "
                f"{len(skipped)} ends with batch {last} at the latest: correct the number, or leave it out"
            )
        if self.train.precision == "bf16" and parallel.zero == 0:
            raise ValueError(
                "train.precision=bf16 with parallel.zero=0 keeps no fp32 masters and trains worse: set parallel.zero=1"
            )
        if parallel.zero == 3 and self.train.compile:
            raise ValueError(
                "parallel.zero=3 with train.compile=true: ZeRO-3's hooks break graphs: set train.compile=false"
            )
        return self
