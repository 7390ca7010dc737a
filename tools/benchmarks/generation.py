"""The benchmark's rows ``prefill``, ``decode`` and ``context``: generation on a CPU, in fp32 and bf16."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import Row, Run, pair_row, peer
from benchmarks.step import bf16_goal
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats import NATIVE
from moe_mamba.model.generation import read
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.base import State
from moe_mamba.parallel.parallelize import cast_to_bf16

MAMBA = ("MambaConfig", "MambaForCausalLM")
CONTEXT_PAIRS = 8  # times as many pairs: a run is short, and two of the same differ by a tenth on a busy machine
TOLERANCE = 1e-4  # of logits, ours beside theirs


@dataclass(frozen=True)
class GenerationShapes:
    """What is measured."""

    layers: int = 8
    d_model: int = 256
    vocab_size: int = 512
    prompt: int = 2048  # tokens that prefill reads
    sequences: tuple[int, ...] = (1, 64)  # that decode at once
    steps: int = 16  # of a run of decode and of context
    contexts: tuple[int, int] = (1024, 2**20)
    context_layers: int = 4
    context_d_model: int = 128
    bf16_layers: int = 24  # more weights than a cache holds
    bf16_d_model: int = 768

    @staticmethod
    def choose(tiny: bool) -> "GenerationShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return GenerationShapes(2, 32, 32, 32, (1, 2), 2, (32, 64), 2, 32, 2, 32) if tiny else GenerationShapes()


def build(pattern: str, layers: int, d_model: int, vocab_size: int, kernels: str = "auto") -> LanguageModel:
    """A model with random weights, in evaluation mode; ``E`` has 8 SwiGLU experts, top-1, dropless."""
    config = ModelConfig(
        pattern=pattern,
        repeat=layers // len(pattern),
        d_model=d_model,
        d_ff=2 * d_model,
        vocab_size=vocab_size,
        activation="swiglu",
    )
    moe = MoEConfig(experts=8, router="top_k", capacity_factor=None, balance="none")
    model = LanguageModel(config, moe, kernels)
    initialize(model, seed=0)
    return model.eval()


def twin(model: LanguageModel) -> Any:
    """Transformers' MambaForCausalLM with the same weights."""
    configuration, theirs_class = (peer("transformers", name, "transformers", "benchmark") for name in MAMBA)
    form = NATIVE["mamba"]
    theirs = theirs_class(configuration(**form.configuration(model.config, model.moe_config))).eval()
    parameters, ours = theirs.state_dict(), model.state_dict()
    for entry in form.entries(model.config, model.moe_config):
        parameters[entry.theirs].copy_(entry.view(ours[entry.ours]))
    return theirs


def prefill_rows(shapes: GenerationShapes, repeats: int) -> list[Row]:
    """Read a prompt, to the logits of its last token and the states, against the same weights in Transformers."""
    model = build("M", shapes.layers, shapes.d_model, shapes.vocab_size)
    tokens = torch.randint(shapes.vocab_size, (1, shapes.prompt))

    @torch.inference_mode()
    def ours() -> Tensor:
        stream, _ = read(model, tokens.tolist())
        return model.logits(stream)

    def their_pass() -> Run:
        theirs = twin(model)

        @torch.inference_mode()
        def run() -> Tensor:
            return theirs(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

        _require_equal(ours(), run())
        return run

    what = f"reading {shapes.prompt:,} tokens, M x {shapes.layers}, d {shapes.d_model}"
    return [pair_row(what, "Transformers' Mamba", ours, their_pass, repeats, 5.0)]


def decode_rows(shapes: GenerationShapes, repeats: int) -> list[Row]:
    """Further tokens of one or many sequences: ``M`` against Transformers, and ``ME`` against our torch kernels."""
    mamba, mixture, plain = (
        build(pattern, shapes.layers, shapes.d_model, shapes.vocab_size, kernels)
        for pattern, kernels in (("M", "auto"), ("ME", "auto"), ("ME", "torch"))
    )
    rows = []
    for sequences in shapes.sequences:
        tokens = torch.randint(shapes.vocab_size, (sequences, shapes.steps))
        what = f"decoding {shapes.steps} tokens of {sequences} sequence{'s' * (sequences > 1)}, d {shapes.d_model}"
        ours = decode(mamba, tokens)
        rows.append(
            pair_row(
                f"{what}, M x {shapes.layers}", "Transformers' Mamba", ours, _theirs(mamba, tokens, ours), repeats, 1.5
            )
        )
        ours, name = decode(mixture, tokens), f"{what}, ME x {shapes.layers // 2}"
        rows.append(pair_row(name, "our torch version", ours, partial(decode, plain, tokens), repeats, 1.0))
    return rows + [_bf16_row(pattern, shapes, repeats) for pattern in ("M", "ME")]


def _bf16_row(pattern: str, shapes: GenerationShapes, repeats: int) -> Row:
    """One sequence in bf16 against fp32, the same model: half the bytes of weights."""
    layers, d_model = shapes.bf16_layers, shapes.bf16_d_model
    wide, narrow = (build(pattern, layers, d_model, shapes.vocab_size) for _ in range(2))
    cast_to_bf16(narrow)
    tokens = torch.randint(shapes.vocab_size, (1, shapes.steps))
    name = f"decoding {shapes.steps} tokens of 1 sequence in bf16, d {d_model}, {pattern} x {layers // len(pattern)}"
    return pair_row(name, "fp32", decode(narrow, tokens), partial(decode, wide, tokens), repeats, bf16_goal(1.5))


def decode(model: LanguageModel, tokens: Tensor, states: list[State | None] | None = None) -> Callable[[], Tensor]:
    """The steps of generation: tokens (sequences, steps), one after the other from the states, to the last logits."""
    begin = states or read(model, tokens[:, :1].tolist())[1]

    @torch.inference_mode()
    def run() -> Tensor:
        states: list[State | None] | None = begin
        for step in range(tokens.shape[1]):
            stream, _, states = model.hidden(tokens[:, step : step + 1], states=states)
            logits = model.logits(stream)
        return logits

    return run


def _theirs(model: LanguageModel, tokens: Tensor, ours: Callable[[], Tensor]) -> Callable[[], Run]:
    def make() -> Run:
        theirs = twin(model)

        @torch.inference_mode()
        def run(states: Any = None) -> Tensor:
            states = states or begin  # they change it: the next run goes on from there
            for step in range(tokens.shape[1]):
                logits = theirs(tokens[:, step : step + 1], cache_params=states, use_cache=True).logits
            return logits[:, -1]

        with torch.no_grad():
            begin, first = (theirs(tokens[:, :1], use_cache=True).cache_params for _ in range(2))
        _require_equal(ours(), run(first))
        return run

    return make


def context_rows(shapes: GenerationShapes, repeats: int) -> list[Row]:
    """Time of a token, and memory of the states, after a million tokens and after a thousand."""
    rows = []
    short, long = shapes.contexts
    for pattern in ("M", "ME"):
        model = build(pattern, shapes.context_layers, shapes.context_d_model, shapes.vocab_size)
        states = [read(model, torch.randint(shapes.vocab_size, (1, length)).tolist())[1] for length in (long, short)]
        tokens = torch.randint(shapes.vocab_size, (1, 4 * shapes.steps))
        after_long, after_short = (decode(model, tokens, state) for state in states)
        name = f"{pattern} x {shapes.context_layers // len(pattern)}, d {shapes.context_d_model}"
        what, against = f"{4 * shapes.steps} tokens after {long:,}, {name}", f"after {short:,}"
        rows.append(pair_row(what, against, after_long, partial(_as_it_is, after_short), CONTEXT_PAIRS * repeats, 0.9))
        ours, theirs = (_kibibytes(state) for state in states)
        rows.append(Row(f"states after {long:,} tokens, {name}", against, "KiB", ours, theirs, theirs / ours, 1.0))
    return rows


def _as_it_is(run: Run) -> Run:
    return run


def _kibibytes(states: list[State | None]) -> float:
    return sum(value.nbytes for state in states if state for value in vars(state).values() if value is not None) / 2**10


def _require_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"logits differ: {text}")
