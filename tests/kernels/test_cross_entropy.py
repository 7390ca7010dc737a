"""Every back end of the cross entropy against float64, whole and sharded vocabularies, and the memory of torch's."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_mamba.errors import UserError
from moe_mamba.kernels.cross_entropy import Reduce, cross_entropy, cross_entropy_with_gradient, torch_cross_entropy
from tests.kernels.available import available, cases, device, typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
TOKENS = 7
NAMES = ("backend", "on")


@pytest.fixture(params=[1 << 19, 32], ids=["one block", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one token or a few; blocks of 32 logits."""
    monkeypatch.setattr(torch_cross_entropy, "CHUNK", request.param)
    if "triton" in available("cross_entropy"):
        module = pytest.importorskip("moe_mamba.kernels.cross_entropy.triton_cross_entropy")
        monkeypatch.setattr(module, "BLOCK", min(request.param, module.BLOCK))


def operands(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits with minus infinity among them, and targets of which some do not count."""
    logits = 4 * torch.randn(TOKENS, vocabulary, dtype=torch.float64)
    targets = torch.randint(0, vocabulary - 1, (TOKENS,))
    logits[:, -1] = -math.inf
    targets[[0, 4]] = -100
    return logits, targets


def results(
    logits: Tensor, targets: Tensor, backend: str, first: int = 0, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of the logits for fixed random weights, in float64 on the CPU."""
    logits = logits.detach().clone().requires_grad_()
    losses = cross_entropy(logits, targets.to(logits.device), first, reduce, backend)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32)
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    losses.backward(weights.to(losses))
    assert logits.grad is not None and logits.grad.dtype == logits.dtype
    return losses.detach().double().cpu(), logits.grad.double().cpu()


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert (value - wanted).norm() <= tolerance * max(wanted.norm(), 1e-3)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("vocabulary", [3, 70])
@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("cross_entropy"))
def test_equals_the_reference(backend: str, on: str, dtype: torch.dtype, vocabulary: int) -> None:
    logits, targets = operands(vocabulary)
    logits = logits.to(dtype)  # the loss of the rounded logits is what is asked for
    expected = results(logits.double(), targets, "reference")
    losses, gradient = results(logits.to(on), targets, backend)
    assert_equal((losses,), expected[:1], min(TOLERANCE[dtype], 1e-5))
    assert_equal((gradient,), expected[1:], TOLERANCE[dtype])
    assert losses[[0, 4]].eq(0).all() and gradient[[0, 4]].eq(0).all() and gradient[:, -1].eq(0).all()


def of_sum(
    logits: Tensor, targets: Tensor, backend: str, first: int = 0, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum, by autograd, in float64 on the CPU."""
    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy(leaf, targets.to(leaf.device), first, reduce, backend)
    return losses.detach().double().cpu(), torch.autograd.grad(losses.sum(), leaf)[0].double().cpu()


def at_once(
    logits: Tensor, targets: Tensor, backend: str, first: int = 0, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """The same without autograd, which may write over its logits."""
    taken = logits.detach().clone()
    losses, gradient = cross_entropy_with_gradient(taken, targets.to(logits.device), first, reduce, backend)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32) and gradient.dtype == logits.dtype
    assert not losses.requires_grad and not gradient.requires_grad
    assert (gradient.data_ptr() == taken.data_ptr()) == (backend == "cpu" and reduce is None)
    return losses.double().cpu(), gradient.double().cpu()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("vocabulary", [3, 70])
@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("cross_entropy_with_gradient"))
def test_losses_and_gradient_at_once(backend: str, on: str, dtype: torch.dtype, vocabulary: int) -> None:
    logits, targets = operands(vocabulary)
    logits = logits.to(dtype)
    expected = of_sum(logits.double(), targets, "reference")
    losses, gradient = at_once(logits.to(on), targets, backend)
    assert_equal((losses,), expected[:1], min(TOLERANCE[dtype], 1e-5))
    assert_equal((gradient,), expected[1:], TOLERANCE[dtype])
    assert losses[[0, 4]].eq(0).all() and gradient[[0, 4]].eq(0).all() and gradient[:, -1].eq(0).all()


@pytest.mark.parametrize(NAMES, cases("cross_entropy_with_gradient"))
def test_at_once_of_a_part_with_bad_targets_and_of_strided_logits(backend: str, on: str) -> None:
    logits, targets = operands(70)
    logits, targets[5] = logits.to(on, torch.float32), 70

    def twice(*parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts[0], 2 * parts[1], parts[2]

    for one, first, reduce in ((logits, 0, None), (logits, 0, twice), (logits[:, 10:], 10, None)):
        expected, found = of_sum(one, targets, backend, first, reduce), at_once(one, targets, backend, first, reduce)
        assert expected[0][5].isnan() == (reduce is None)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    for strided in (logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :70]):
        losses, gradient = cross_entropy_with_gradient(strided, targets.to(on), backend=backend)
        torch.testing.assert_close(
            (losses.double().cpu(), gradient.double().cpu()),
            of_sum(logits, targets, backend),
            rtol=1e-6,
            atol=1e-7,
            equal_nan=True,
        )


@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_equals_torchs_cross_entropy(backend: str, on: str) -> None:
    logits, targets = operands(70)
    leaf = logits.clone().requires_grad_()
    losses = functional.cross_entropy(leaf, targets, reduction="none")
    losses.backward(torch.linspace(-1, 2, TOKENS, dtype=torch.float64))
    assert leaf.grad is not None
    assert_equal(results(logits.to(on, torch.float32), targets, backend), (losses.detach(), leaf.grad), 1e-5)


@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_the_gradient_of_a_sum_which_is_expanded(backend: str, on: str) -> None:
    logits, targets = operands(70)
    gradients = []
    for leaf, name in ((logits, "reference"), (logits.to(on, torch.float32), backend)):
        losses = cross_entropy(leaf.requires_grad_(), targets.to(leaf.device), backend=name)
        gradients.append(torch.autograd.grad(losses.sum(), leaf)[0].double().cpu())
    assert_equal((gradients[1],), (gradients[0],), 1e-5)


@pytest.mark.parametrize("backend", available("cross_entropy", "cpu", torch.float64))
def test_gradcheck(backend: str) -> None:
    logits, targets = operands(6)
    finite = logits[:, :-1].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: cross_entropy(value, targets, backend=backend), finite)


def statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a part must hand to ``reduce``."""
    is_inside = (local >= 0) & (local < logits.shape[1])
    predicted = logits.gather(1, local.masked_fill(~is_inside, 0)[:, None])[:, 0].masked_fill(~is_inside, 0)
    top = logits.amax(1)
    return top, (logits - top.masked_fill(top == -math.inf, 0)[:, None]).exp().sum(1), predicted


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [35, 69])  # 69: the second part is nothing but minus infinity
@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_a_sharded_vocabulary_equals_the_whole(backend: str, on: str, rows: int) -> None:
    logits, targets = operands(70)
    whole = results(logits, targets, "reference")
    parts, firsts = logits.to(on, torch.float32).split([rows, 70 - rows], 1), (0, rows)
    gradients = []
    for rank in (0, 1):
        others = statistics(parts[1 - rank], targets.to(on) - firsts[1 - rank])

        def reduce(*mine: Tensor, others: tuple[Tensor, ...] = others) -> tuple[Tensor, Tensor, Tensor]:
            tops, totals, hits = (torch.stack(both) for both in zip(mine, others, strict=True))
            top = tops.amax(0)
            return top, (totals * (tops - top).exp()).sum(0), hits.sum(0)

        losses, gradient = results(parts[rank], targets, backend, firsts[rank], reduce)
        assert_equal((losses,), whole[:1], 1e-5)
        gradients.append(gradient)
    assert_equal((torch.cat(gradients, 1),), whole[1:], 1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", [name for name in available("cross_entropy") if name != "reference"])
def test_a_part_hands_over_its_statistics(name: str) -> None:
    logits, targets = operands(70)
    handed: list[Tensor] = []

    def reduce(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        handed.extend(values)
        return values[0], values[1], values[2]

    logits = logits.float()
    logits[3] = -math.inf
    cross_entropy(logits.to(device()), targets.to(device()), 20, reduce, name)
    for value, wanted in zip(handed, statistics(logits, targets - 20), strict=True):
        torch.testing.assert_close(value.cpu(), wanted)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_extreme_strided_and_empty_logits(backend: str, on: str) -> None:
    logits, targets = operands(70)
    logits[1], logits[2, 5], logits[0, 0] = 1e4 + logits[1], math.nan, math.nan
    wide = torch.cat((logits, logits), 1).to(on, torch.float32)
    for strided in (wide[:, :70], logits.to(on, torch.float32).t().contiguous().t()):
        losses, gradient = results(strided, targets, backend)
        assert losses[2].isnan() and gradient[2].isnan().any()
        assert losses[0] == 0 and (backend == "reference" or gradient[0].eq(0).all())  # whatever its logits are
        good = [1, 3, 5, 6]
        expected = results(logits, targets, "reference")
        assert_equal((losses[good], gradient[good]), (expected[0][good], expected[1][good]), 1e-3)
    assert cross_entropy(wide[:0], targets[:0].to(on), backend=backend).shape == (0,)


@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_a_target_outside_the_vocabulary_gives_nan(backend: str, on: str) -> None:
    logits = torch.randn(3, 5, device=on)
    losses = cross_entropy(logits, torch.tensor([5, -1, 4], device=on), backend=backend)
    assert losses.isnan().tolist() == [True, True, False]
    parted = cross_entropy(logits, torch.tensor([5, -1, 4], device=on), 0, lambda *parts: parts, backend)
    torch.testing.assert_close(parted[:2], logits[:2].logsumexp(1))


def test_torch_does_not_wait_for_an_accelerator() -> None:
    """Tensors of the device ``meta`` have no values, and so raise where the host asks for one."""
    logits = torch.empty(3, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cross_entropy(logits, torch.empty(3, dtype=torch.int64, device="meta"), backend="torch").sum().backward()


@pytest.mark.parametrize(NAMES, cases("cross_entropy"))
def test_is_deterministic(backend: str, on: str) -> None:
    logits, targets = operands(70)
    first, second = (results(logits.to(on, torch.float32), targets, backend) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logits", torch.zeros(2, 3, 4), r"logits has shape \(2, 3, 4\), and must be \(tokens, rows\)"),
        ("targets", torch.zeros(3, dtype=torch.long), r"targets has shape \(3,\), and must have \(2,\)"),
        ("targets", torch.zeros(2), "targets is torch.float32, and must be torch.int64"),
        ("backend", "fast", "no back end 'fast'"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, Any] = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.long), name: value}
    with pytest.raises(UserError, match=words) as caught:
        cross_entropy(**made)
    assert "\n" not in str(caught.value)


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from moe_mamba.kernels.cross_entropy import cross_entropy

def resident(kind):  # MiB; VmRSS now, VmHWM the highest
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak(tokens, backend):
    logits = torch.ones(tokens, 32_768, dtype=torch.bfloat16, requires_grad=True)  # 64 MiB for 1,024 tokens
    Path("/proc/self/clear_refs").write_text("5")  # the highest from here on
    before = resident("VmRSS")
    cross_entropy(logits, torch.zeros(tokens, dtype=torch.long), backend=backend).sum().backward()
    return resident("VmHWM") - before

print(json.dumps({name: (peak(8, name), peak(1024, name))[1] for name in sys.argv[1:]}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_gradient_is_all_that_is_made_but_for_a_small_chunk(request: pytest.FixtureRequest) -> None:
    names = [name for name in ("cpu", "torch", "reference") if name in available("cross_entropy", "cpu")]
    words = [sys.executable, "-c", MEASURE, *names]
    done = subprocess.run(words, capture_output=True, text=True, cwd=request.config.rootpath)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    for name in names[:-1]:
        assert 64 <= peaks[name] < 64 + 16  # MiB beside the logits; the gradient is 64 of them
    assert peaks["reference"] > 64 + 128  # what the measure says of a version that holds the logits in fp32
