"""The head's loss by chunks of tokens against float64 logits, whole and sharded vocabularies, and its memory."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional

from moe_mamba.errors import UserError
from moe_mamba.kernels import products, requirements
from moe_mamba.kernels.cross_entropy import cross_entropy, linear
from moe_mamba.kernels.cross_entropy.linear import linear_cross_entropy, linear_scores
from moe_mamba.kernels.products import Product
from tests.kernels.available import cases, typed_cases

TOKENS, D_MODEL = 7, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SCALE = 0.37  # of the sum, as the objective's
ARGMAX = partial(torch.argmax, dim=-1)


@pytest.fixture(params=["one chunk", "chunks of four tokens", "chunks of one token"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Seven tokens are no multiple of four."""
    size = {"one chunk": 2**28, "chunks of four tokens": -1, "chunks of one token": 1}[request.param]
    if size < 0:
        usual = linear._chunks

        def of_four(stream: Tensor, weight: Tensor, rows: int, product: Product, is_whole: bool) -> Any:
            monkeypatch.setattr(linear, "CHUNK", 4 * weight.shape[0] * stream.itemsize)
            return usual(stream, weight, rows, product, is_whole)

        monkeypatch.setattr(linear, "_chunks", of_four)
    else:
        monkeypatch.setattr(linear, "CHUNK", size)
    return request.param


def operands(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stream, weight and targets, of which some do not count; a word's logits are minus infinity."""
    stream = torch.randn(TOKENS, D_MODEL, dtype=torch.float64)
    weight = torch.randn(vocabulary, D_MODEL, dtype=torch.float64)
    targets = torch.randint(0, vocabulary - 1, (TOKENS,))
    targets[[0, 4, 6]] = -100
    return stream, weight, targets


def expected_of(stream: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64 with all logits, by torch's own functions."""
    stream, weight = (leaf.detach().double().requires_grad_() for leaf in (stream, weight))
    loss = functional.cross_entropy(functional.linear(stream, weight), targets, reduction="sum")
    (SCALE * loss).backward()
    assert stream.grad is not None and weight.grad is not None
    return loss.detach(), stream.grad, weight.grad


def results(stream: Tensor, weight: Tensor, targets: Tensor, **keys: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients, in float64 on the CPU."""
    stream, weight = (leaf.detach().clone().requires_grad_() for leaf in (stream, weight))
    loss = linear_cross_entropy(stream, weight, targets.to(stream.device), **keys)
    assert loss.shape == () and loss.dtype == torch.promote_types(stream.dtype, torch.float32)
    (SCALE * loss).backward()
    assert stream.grad is not None and stream.grad.dtype == stream.dtype
    assert weight.grad is not None and weight.grad.dtype == weight.dtype
    return loss.detach().double().cpu(), stream.grad.double().cpu(), weight.grad.double().cpu()


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert (value - wanted).norm() <= tolerance * max(wanted.norm(), 1e-3)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("vocabulary", [3, 70])
@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("cross_entropy"))
def test_equals_float64(backend: str, on: str, dtype: torch.dtype, vocabulary: int) -> None:
    stream, weight, targets = operands(vocabulary)
    stream, weight = stream.to(on, dtype), weight.to(on, dtype)
    found = results(stream, weight, targets, backend=backend)
    assert_equal(found, expected_of(stream.cpu(), weight.cpu(), targets), TOLERANCE[dtype])
    assert found[1][[0, 4, 6]].eq(0).all()


@pytest.mark.usefixtures("chunks")
def test_scores_are_those_of_all_logits() -> None:
    stream, weight, targets = operands(70)
    logits = stream @ weight.t()
    targets[1:3] = logits[1:3].argmax(-1)
    loss, right = linear_scores(stream.requires_grad_(), weight, targets, argmax=ARGMAX)
    torch.testing.assert_close(loss, cross_entropy(logits, targets).sum().detach())
    assert right == (logits.argmax(-1) == targets).sum() >= 2
    assert not loss.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(stream, weight, targets), loss)


@pytest.mark.usefixtures("chunks")
def test_a_weight_of_another_dtype_is_cast_and_has_its_own_gradient() -> None:
    stream, weight, targets = operands(70)
    stream = stream.bfloat16()
    found = results(stream, weight.float(), targets)
    assert_equal(found, expected_of(stream, weight.bfloat16(), targets), 2e-2)


def test_a_bf16_weights_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand chunks with the same gradient, the sum in bf16 would stop to grow after some hundred."""
    monkeypatch.setattr(linear, "CHUNK", 1)
    stream, weight = torch.ones(1024, 2).bfloat16(), torch.zeros(4, 2).bfloat16()
    targets = torch.zeros(1024, dtype=torch.long)
    _, _, gradient = results(stream, weight, targets)
    assert_equal((gradient,), (expected_of(stream, weight, targets)[2],), 4e-3)


@pytest.mark.parametrize(
    ("device", "weight", "is_whole", "most"),
    [
        ("cpu", linear.CACHED, True, linear.CACHED),
        ("cpu", linear.CACHED + 1, True, linear.CHUNK),  # does not stay in the cache
        ("cpu", linear.CACHED, False, linear.CHUNK),  # every chunk waits for other ranks
        ("cuda", linear.CACHED, True, linear.CHUNK),
    ],
)
def test_a_chunk_of_a_cpu_stays_in_its_cache(device: str, weight: int, is_whole: bool, most: int) -> None:
    assert linear.chunk_bytes(device, weight, is_whole) == most


def test_chunks_of_a_small_vocabulary_on_a_cpu() -> None:
    """By their number: what each adds to the weight's gradient is tested above."""
    stream, weight, targets = torch.randn(3000, 4), torch.randn(1024, 4), torch.randint(0, 1024, (3000,))
    seen = list[int]()
    linear_scores(stream, weight, targets, argmax=lambda logits: seen.append(len(logits)) or logits.argmax(-1))
    assert seen == [1000, 1000, 1000]  # 12 MB of logits, 4 MiB at a time


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(needed: tuple[bool, bool]) -> None:
    stream, weight, targets = operands(70)
    leaves = [leaf.requires_grad_(is_needed) for leaf, is_needed in zip((stream, weight), needed, strict=True)]
    (SCALE * linear_cross_entropy(*leaves, targets)).backward()
    for leaf, is_needed, wanted in zip(leaves, needed, expected_of(stream, weight, targets)[1:], strict=True):
        assert (leaf.grad is not None) == is_needed
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, wanted)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("rows", [35, 69, 70])  # 70: the second part is nothing but padding
@pytest.mark.parametrize(("backend", "on"), cases("cross_entropy"))
def test_a_sharded_vocabulary_equals_the_whole(backend: str, on: str, rows: int) -> None:
    """Two parts of as many rows, padded; each is handed what both have, as an all-reduce would."""
    stream, weight, targets = operands(70)
    whole = expected_of(stream, weight, targets)
    parts = [functional.pad(part, (0, 0, 0, rows - len(part))) for part in (weight[:rows], weight[rows:])]
    keys = [{"first": rank * rows, "rows": real, "backend": backend} for rank, real in enumerate((rows, 70 - rows))]
    parts, stream = [part.to(on, torch.float32) for part in parts], stream.to(on, torch.float32)
    handed: list[list[tuple[Tensor, ...]]] = [[], []]
    for rank in (0, 1):

        def keep(*mine: Tensor, rank: int = rank) -> Any:
            handed[rank].append(mine)
            return mine

        linear_cross_entropy(stream, parts[rank], targets.to(on), reduce=keep, **keys[rank])
    stream_gradient = torch.zeros(TOKENS, D_MODEL, dtype=torch.float64)
    for rank in (0, 1):
        order = iter(zip(*handed, strict=True))

        def reduce(*_: Tensor, order: Any = order) -> tuple[Tensor, Tensor, Tensor]:
            tops, totals, hits = (torch.stack(both) for both in zip(*next(order), strict=True))
            top = tops.amax(0)
            return top, (totals * (tops - top).exp()).sum(0), hits.sum(0)

        loss, one, gradient = results(stream, parts[rank], targets, reduce=reduce, **keys[rank])
        assert next(order, None) is None
        stream_gradient += one
        real = keys[rank]["rows"]
        assert_equal((loss, gradient[:real]), (whole[0], whole[2][rank * rows : rank * rows + real]), 1e-5)
        assert gradient[real:].eq(0).all()
    assert_equal((stream_gradient,), whole[1:2], 1e-5)


@pytest.mark.usefixtures("chunks")
def test_no_tokens_and_none_that_counts() -> None:
    stream, weight, targets = operands(70)
    for some, ignored in ((stream[:0], targets[:0]), (stream, torch.full_like(targets, -100))):
        loss, stream_gradient, weight_gradient = results(some, weight, ignored)
        assert loss == 0 and stream_gradient.shape == some.shape
        assert stream_gradient.eq(0).all() and weight_gradient.eq(0).all()
        assert [float(value) for value in linear_scores(some, weight, ignored, argmax=ARGMAX)] == [0, 0]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("backend", "on"), cases("cross_entropy"))
def test_a_target_outside_the_vocabulary_gives_nan(backend: str, on: str) -> None:
    stream, weight, targets = operands(70)
    for bad in (70, -1):
        targets[5] = bad
        assert results(stream.to(on, torch.float32), weight.to(on, torch.float32), targets, backend=backend)[0].isnan()


@pytest.mark.usefixtures("chunks")
def test_minus_infinity() -> None:
    """Of a word that no token can be, as a stream of only positive numbers and a row of minus infinity give it."""
    stream, weight, targets = operands(70)
    stream, weight[69] = stream.abs(), -math.inf
    loss, _, weight_gradient = results(stream, weight, targets)
    shorter = expected_of(stream, weight[:69], targets)
    torch.testing.assert_close(loss, shorter[0])
    torch.testing.assert_close(weight_gradient[:69], shorter[2])
    assert weight_gradient[69].eq(0).all()


@pytest.mark.usefixtures("chunks")
def test_is_deterministic_and_refuses_a_second_backward() -> None:
    stream, weight, targets = operands(70)
    one, two = (results(stream.float(), weight.float(), targets) for _ in range(2))
    assert all(torch.equal(*both) for both in zip(one, two, strict=True))
    loss = linear_cross_entropy(stream.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_does_not_wait_for_an_accelerator() -> None:
    """Tensors of the device ``meta`` have no values, and so raise where the host asks for one."""
    stream, weight = (torch.empty(size, 8, device="meta", requires_grad=True) for size in (5, 9))
    targets = torch.empty(5, dtype=torch.int64, device="meta")
    linear_cross_entropy(stream, weight, targets, backend="torch").backward()
    linear_scores(stream, weight, targets, argmax=ARGMAX, backend="torch")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stream", torch.zeros(2, 3, 4), r"stream has shape \(2, 3, 4\), and must be \(tokens, d_model\)"),
        ("weight", torch.zeros(4), r"weight has shape \(4,\), and must be \(rows, d_model\)"),
        ("weight", torch.zeros(4, 5), r"weight has shape \(4, 5\), and must have \(4, 3\)"),
        ("targets", torch.zeros(3, dtype=torch.long), r"targets has shape \(3,\), and must have \(2,\)"),
        ("targets", torch.zeros(2), "targets is torch.float32, and must be torch.int64"),
        ("backend", "fast", "no back end 'fast'"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, Any] = {"stream": torch.zeros(2, 3), "weight": torch.zeros(4, 3)}
    made |= {"targets": torch.zeros(2, dtype=torch.long), name: value}
    for function, keys in ((linear_cross_entropy, {}), (linear_scores, {"argmax": ARGMAX})):
        with pytest.raises(UserError, match=words) as caught:
            function(**made, **keys)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


def all_logits(stream: Tensor, weight: Tensor, targets: Tensor, backend: str = "auto") -> Tensor:
    """What the loss was before: the logits of all tokens, and their gradient."""
    return cross_entropy(functional.linear(stream, weight), targets, backend=backend).sum()


def tracked_peak(loss: Callable[..., Tensor], tokens: int, words: int, d_model: int, dtype: torch.dtype) -> int:
    """Bytes at most, by torch's tracker, arguments included; tensors on the device ``meta`` take none themselves."""
    stream, weight = (
        torch.empty(size, d_model, dtype=dtype, device="meta", requires_grad=True) for size in (tokens, words)
    )
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with MemTracker() as tracker:
        loss(stream, weight, targets, backend="torch").backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_32768_tokens_and_50304_words_falls_by_the_logits(dtype: torch.dtype) -> None:
    tokens, words, d_model = sizes = 32_768, 50_304, 512
    logits, width = tokens * words * dtype.itemsize, dtype.itemsize
    before, now = (tracked_peak(loss, *sizes, dtype) for loss in (all_logits, linear_cross_entropy))
    assert before > 2 * logits  # and their gradient
    assert before - now > logits
    # Two chunks; the stream and its gradient; the weight, its gradient in fp32, and where it is bf16 also in its own.
    streams, weights = 2 * tokens * d_model * width, words * d_model * (8 if width == 4 else 2 + 4 + 2)
    assert now < 2 * linear.CHUNK + streams + weights + 2**25


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from torch.nn import functional
from moe_mamba.kernels.cross_entropy import cross_entropy, linear

tokens, vocabulary, d_model, linear.CHUNK = map(int, sys.argv[1:5])

def resident(kind):  # MiB; VmRSS now, VmHWM the highest
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def all_logits(stream, weight, targets):
    return cross_entropy(functional.linear(stream, weight), targets).sum()

def peak(loss, tokens):
    stream, weight = (torch.ones(size, d_model, requires_grad=True) for size in (tokens, vocabulary))
    targets = torch.zeros(tokens, dtype=torch.long)
    Path("/proc/self/clear_refs").write_text("5")  # the highest from here on
    before = resident("VmRSS")
    loss(stream, weight, targets).backward()
    return resident("VmHWM") - before

both = {"fused": linear.linear_cross_entropy, "all logits": all_logits}
print(json.dumps({name: (peak(loss, 8), peak(loss, tokens))[1] for name, loss in both.items()}))
"""


def peaks(request: pytest.FixtureRequest, *sizes: int) -> dict[str, float]:
    """MiB beside the arguments, of a forward and a backward pass in fp32; sizes: tokens, words, d_model, CHUNK."""
    command = [sys.executable, "-c", MEASURE, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_the_chunks_held_and_the_gradients(request: pytest.FixtureRequest) -> None:
    tokens, words, d_model, chunk = 2048, 16_384, 80, 2**26  # the weight is beyond a CPU's cache
    logits, gradients = tokens * words * 4 / 2**20, (tokens + words) * d_model * 4 / 2**20  # 128 and 5.6 MiB
    held = linear.held_chunks("cpu", True) if requirements.cpu() is None else 2  # torch's gradient is new memory
    found = peaks(request, tokens, words, d_model, chunk)
    assert found["all logits"] > 1.5 * logits  # they and their gradient, less what the first pass left free
    assert 0.9 * held * chunk / 2**20 < found["fused"] < held * chunk / 2**20 + gradients + 32


@pytest.mark.skipif(requirements.cpu() is not None, reason="no C++ compiler")
def test_bf16_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no addresses: on a CPU that does not multiply bf16, C++ must not be given any."""
    monkeypatch.setattr(products, "processor_flags", lambda: frozenset())
    products.read_processor.cache_clear()
    with FakeTensorMode():
        stream, weight = (torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in ((6, 4), (9, 4)))
        loss = linear_cross_entropy(stream, weight, torch.zeros(6, dtype=torch.int64))
        loss.backward()
        assert stream.grad is not None and stream.grad.shape == stream.shape
    products.read_processor.cache_clear()
