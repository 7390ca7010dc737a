"""Measure this project against its peers: ``python tools/benchmark.py``.

Speed depends on the machine and on its neighbours, so every figure is a ratio from one run: ours and theirs take
turns, and the median of the ratios of the pairs is reported.
"""

import gzip
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe import MoEShapes, moe_rows
from benchmarks.pairs import Row, compare
from benchmarks.scaling import ScalingShapes, scaling_rows
from moe_mamba.command_line import run_command
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.errors import UserError
from moe_mamba.kernels import selective_scan
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel

ROWS = ("scan", "step", "moe", "scaling", "preprocess")
VOCABULARY = 2048  # of the SentencePiece model that is trained where no tokenizer is named
STATUS = Path("/proc/self/status")  # Linux: the only place that tells a process's own peak

Operands = list[Tensor]
Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class Shapes:
    """What is measured; ``tiny`` only shows that the tool runs."""

    batch: int = 8
    length: int = 256
    memory_length: int = 1024
    d_model: int = 256
    d_expert: int = 512
    vocab_size: int = 512
    pairs: int = 4  # of Mamba and experts
    copies: int = 20  # of the built-in corpus

    @staticmethod
    def choose(tiny: bool) -> "Shapes":
        """The shapes that the README reports, or the tiny ones."""
        return Shapes(2, 16, 64, 32, 32, 32, 1, 1) if tiny else Shapes()


def main(
    only: str = ",".join(ROWS),
    output: str | None = None,
    repeats: int = 3,
    documents: str = "builtin",
    tokenizer: str = "sentencepiece",
    tiny: bool = False,
) -> None:
    """Compare with Transformers, plain autograd, DeepSpeed, one process and a tokenizer's encoding; print a table.

    Args:
        only: rows to measure, of scan, step, moe, scaling and preprocess, separated by commas.
        output: file to write the rows to as well, as JSON.
        repeats: pairs of measurements a row.
        documents: what preprocess reads, in the syntax of data.train; builtin is taken 20 times over.
        tokenizer: what preprocess encodes with: gpt2, bytes, a folder, a .model file, or sentencepiece to train one.
        tiny: shapes so small that the figures mean nothing, to try the tool.
    """
    unknown = [name for name in only.split(",") if name not in ROWS]
    if unknown:
        raise UserError(f"--only={only}: no row is called {unknown[0]!r}: choose among {', '.join(ROWS)}")
    if repeats < 1:
        raise UserError(f"--repeats={repeats}: give 1 or more")
    shapes = Shapes.choose(tiny)
    rows: list[Row] = []
    if "scan" in only:
        rows += [*scan_rows(shapes, repeats), *memory_rows(shapes)]
    if "step" in only:
        rows.append(step_row(shapes, repeats))
    if "moe" in only:
        rows += moe_rows(MoEShapes.choose(tiny), repeats)
    if "scaling" in only:
        rows += scaling_rows(ScalingShapes.choose(tiny), repeats)
    if "preprocess" in only:
        rows.append(preprocess_row(documents, tokenizer, shapes, repeats))
    print(table(rows))
    if output is not None:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        content = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2)
        Path(output).write_text(content + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | against | ours | theirs | ratio | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.ours:,.1f} {row.unit} | {row.theirs:,.1f} {row.unit} | {row.ratio:.2f} | {row.goal:g}"
        lines.append(f"| {row.what} | {row.against} | {figures} |")
    return "\n".join(lines)


# --- the selective scan


def scan_rows(shapes: Shapes, repeats: int) -> list[Row]:
    """Forward and backward of the scan, softplus, D and gate included, in fp32: against two loops over time."""
    operands = scan_operands(shapes.batch, shapes.length, 2 * shapes.d_model)
    name = f"scan, forward and backward, {shapes.batch} x {shapes.length} x {2 * shapes.d_model} x 16"
    rows = []
    for peer, against, goal in (
        (transformers_scan(), "Transformers' loop", 60.0),
        (plain_scan, "plain loop with autograd", 1.0),
    ):
        pair = compare(partial(both_ways, our_scan, operands), partial(both_ways, peer, operands), repeats)
        rows.append(Row(name, against, "ms", *pair, goal=goal))
    return rows


def memory_rows(shapes: Shapes) -> list[Row]:
    """Peak memory of the scan's forward and backward, each in a process of its own (on Linux)."""
    if not STATUS.exists():
        return []
    size = (shapes.batch, shapes.memory_length, 2 * shapes.d_model)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(1, spawn) as other:
        peaks = one.submit(peak_memory, False, size), other.submit(peak_memory, True, size)
    ours, theirs = (peak.result() / 2**20 for peak in peaks)
    name = f"scan, peak memory, {size[0]} x {size[1]} x {size[2]} x 16"
    return [Row(name, "plain loop with autograd", "MiB", ours, theirs, theirs / ours, goal=3.0)]


def scan_operands(batch: int, length: int, d_inner: int, d_state: int = 16) -> Operands:
    """x, delta, A, B, C, D, z and the bias of delta, as a mixer at the start of its training has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    wide, narrow = (batch, length, d_inner), (batch, length, d_state)
    made = [normal(*wide), normal(*wide), A, normal(*narrow), normal(*narrow), normal(d_inner), normal(*wide)]
    return [tensor.requires_grad_() for tensor in (*made, normal(d_inner) - 4)]


def both_ways(scan: Scan, operands: Operands) -> None:
    """One forward and one backward pass."""
    y = scan(*operands)
    torch.autograd.grad(y, operands, torch.ones_like(y))


def our_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The back end that this machine gets."""
    return selective_scan(x, delta, A, B, C, D, z, bias)[0]


def plain_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """A loop over time as one would write it with some care, and autograd."""
    delta = F.softplus(delta + bias)
    h = x.new_zeros(x.shape[0], *A.shape)  # (batch, d_inner, d_state)
    read = []
    for delta_t, entering, B_t, C_t in zip(*(v.unbind(1) for v in (delta, delta * x, B, C)), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + entering[..., None] * B_t[:, None]
        read.append((h @ C_t[..., None])[..., 0])
    return (torch.stack(read, 1) + D * x) * F.silu(z)


def transformers_scan() -> Scan:
    """The recurrence of Transformers' Mamba and Jamba, given its operands in its own layout."""
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError as error:
        raise UserError("the benchmark needs transformers 5.20 or later: pip install -e '.[benchmark]'") from error

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        x, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (x, delta, B, C, z))
        return mamba_selective_scan(x, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)

    return scan


def peak_memory(plain: bool, size: tuple[int, int, int]) -> int:
    """Bytes that a forward and backward pass adds to this process at its peak, gradients included."""
    scan: Scan = plain_scan if plain else our_scan
    both_ways(scan, scan_operands(1, 32, 64))
    operands = scan_operands(*size)
    before = _status("VmRSS")
    both_ways(scan, operands)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


# --- a training step


def step_row(shapes: Shapes, repeats: int) -> Row:
    """Forward, backward and AdamW of a whole model, in fp32, against JambaForCausalLM of the same shapes."""
    ours, theirs = our_model(shapes), their_model(shapes)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise AssertionError(f"the models differ: {sizes[0]} and {sizes[1]} parameters")
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))

    def our_logits() -> Tensor:
        return ours(tokens).logits

    def their_logits() -> Tensor:
        return theirs(tokens, use_cache=False).logits

    steps = [training_step(model, run, tokens) for model, run in ((ours, our_logits), (theirs, their_logits))]
    name = f"training step, ME x {shapes.pairs}, d {shapes.d_model}, {shapes.batch} x {shapes.length} tokens"
    return Row(name, "Transformers' Jamba", "ms", *compare(steps[0], steps[1], repeats), goal=15.0)


def training_step(model: nn.Module, logits: Callable[[], Tensor], tokens: Tensor) -> Callable[[], None]:
    """What one step of training does, the same for both."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        predicted = logits()[:, :-1].flatten(0, 1)
        F.cross_entropy(predicted, tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_model(shapes: Shapes) -> LanguageModel:
    """``ME`` with Jamba's norms and SwiGLU experts, top-1, dropless."""
    config = ModelConfig(
        pattern="ME",
        repeat=shapes.pairs,
        d_model=shapes.d_model,
        vocab_size=shapes.vocab_size,
        mamba_norms=True,
        activation="swiglu",
        d_ff=shapes.d_expert,
    )
    model = LanguageModel(config, MoEConfig(experts=8, router="top_k", capacity_factor=None, balance="none"))
    initialize(model, seed=0)
    return model


def their_model(shapes: Shapes) -> nn.Module:
    """The same in Transformers, without attention layers."""
    from transformers import JambaConfig, JambaForCausalLM

    return JambaForCausalLM(
        JambaConfig(
            num_hidden_layers=shapes.pairs,
            attn_layer_period=shapes.pairs + 1,
            attn_layer_offset=shapes.pairs,
            expert_layer_period=1,
            expert_layer_offset=0,
            hidden_size=shapes.d_model,
            intermediate_size=shapes.d_expert,
            vocab_size=shapes.vocab_size,
            num_experts=8,
            num_experts_per_tok=1,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=-(-shapes.d_model // 16),
            num_attention_heads=1,
            num_key_value_heads=1,
            use_mamba_kernels=False,
            tie_word_embeddings=False,
            pad_token_id=None,
        )
    )


# --- preprocessing


def preprocess_row(documents: str, tokenizer_name: str, shapes: Shapes, repeats: int) -> Row:
    """Documents a second into shards, from the file to the checksums, against encoding alone on as many cores."""
    from moe_mamba.data.corpus import Corpus
    from moe_mamba.data.preprocess import preprocess
    from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        copies = shapes.copies if documents == "builtin" else 1
        source = write_builtin(Path(folder), copies) if documents == "builtin" else documents
        texts = [document.text for document in Corpus(source).documents()]
        if tokenizer_name == "sentencepiece":
            tokenizer: Tokenizer = train_sentencepiece(texts[: len(texts) // copies], VOCABULARY, folder)
        else:
            tokenizer = load_tokenizer(tokenizer_name)
        outputs = iter(range(repeats + 1))

        def ours() -> None:
            preprocess(source, tokenizer, Path(folder) / f"shards-{next(outputs)}", workers, progress=False)

        pair = compare(ours, lambda: tokenizer.encode_batch(texts), repeats)
    name = f"preprocessing, {len(texts):,} documents, {workers} processes"
    return Row(name, "the tokenizer's own batch encoding", "ms", *pair, goal=0.8)


def write_builtin(folder: Path, copies: int) -> str:
    """The built-in corpus several times over, as C4 lies in its files."""
    from moe_mamba.data.corpus import Corpus

    path = folder / "documents.json.gz"
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for _ in range(copies):
            for document in Corpus("builtin").documents():
                file.write(json.dumps({"text": document.text}) + "\n")
    return str(path)


if __name__ == "__main__":
    run_command(main)
