"""Every back end of routing against plain loops in float64: orders, values, all gradients; no value is looked at."""

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_mamba.errors import UserError
from moe_mamba.kernels import Order, combine_rows, gather_rows, grouped_matmul, sort_by_expert
from tests.kernels.available import available, cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SORTS, BACKENDS = cases("sort_by_expert"), cases("gather_rows")
# tokens, k, experts, capacity: one too small, one larger than needed, without one; more than one block of choices
SHAPES = [
    (1, 1, 1, None), (1, 1, 3, 1), (1, 2, 8, 2), (23, 1, 1, 5), (23, 1, 3, 4), (23, 2, 3, 40), (37, 2, 8, None),
    (37, 2, 33, 2), (300, 1, 33, None), (300, 2, 8, 60), (40, 1, 33, 3),
]  # fmt: skip


def choices(tokens: int, k: int, experts: int, on: str = "cpu") -> Tensor:
    """Different experts for each token; the odd ones are chosen by nobody where there are enough others."""
    scores = torch.rand(tokens, experts)
    if (experts + 1) // 2 >= k:
        scores[:, 1::2] -= 1
    return scores.topk(min(k, experts)).indices.to(on)


def expert_choice(tokens: int, experts: int, capacity: int, on: str) -> Order:
    """Each expert's tokens are all different; a token may have any number of experts."""
    token = torch.stack([torch.randperm(tokens)[:capacity] for _ in range(experts)])
    slot = torch.full((tokens, experts), -1)
    for expert, row in enumerate(token):
        slot[row, expert] = expert * capacity + torch.arange(capacity)
    counts = torch.full((experts,), capacity)
    dropped = (slot < 0).all(1).sum()
    return Order(*(tensor.to(on) for tensor in (token.reshape(-1), slot, counts, counts, dropped)))


def orders(on: str) -> Iterator[tuple[int, Order]]:
    for tokens, k, experts, capacity in SHAPES:
        yield tokens, sort_by_expert(choices(tokens, k, experts, on), experts, capacity, backend="reference")
    for experts in (3, 33):
        yield 20, expert_choice(20, experts, 4, on)


def results(order: Order, tokens: int, d: int, dtype: torch.dtype, backend: str, strided: bool) -> dict[str, Tensor]:
    """Both operations and their gradients for numbers that depend only on the shapes."""
    generator = torch.Generator().manual_seed(tokens * d)

    def draw(*shape: int, width: int = 1) -> Tensor:
        values = torch.randn(*shape[:-1], width * shape[-1], dtype=torch.float64, generator=generator)
        values = values.to(order.token.device, dtype)
        return (values if strided else values.clone())[..., : shape[-1]]

    rows = len(order.token)
    width = 2 if strided else 1
    filled = torch.isin(torch.arange(rows, device=order.slot.device), order.slot)
    x, y, dx = draw(tokens, d, width=width), draw(rows, d, width=width), draw(rows, d, width=width)
    dy = draw(tokens, d, width=width)
    weight = (torch.rand(rows, dtype=torch.float64, generator=generator).to(filled.device) * filled).to(
        torch.promote_types(dtype, torch.float32)
    )
    x, y, weight = (tensor.detach().requires_grad_() for tensor in (x, y, weight))
    gathered = gather_rows(x, order.token, order.slot, backend=backend)
    combined = combine_rows(y, weight, order.token, order.slot, backend=backend)
    assert gathered.dtype == combined.dtype == dtype
    torch.autograd.backward([gathered, combined], [dx, dy])
    found = {"gathered": gathered, "combined": combined, "dx": x.grad, "drows": y.grad, "dweight": weight.grad}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "on"), SORTS)
def test_the_order_equals_plain_loops(backend: str, on: str, shape: tuple[Any, ...]) -> None:
    tokens, k, experts, capacity = shape
    chosen = choices(tokens, k, experts, on)
    expected = sort_by_expert(chosen, experts, capacity, backend="reference")
    for given in (chosen, chosen.t().contiguous().t()):
        order = sort_by_expert(given, experts, capacity, backend=backend)
        for one, other in zip(astuple(order), astuple(expected), strict=True):
            assert one.dtype == torch.int64 and torch.equal(one, other)


def test_the_reference_orders_a_small_case_as_one_does_by_hand() -> None:
    chosen = torch.tensor([[1, 0], [1, 2], [1, 0]])
    order = sort_by_expert(chosen, 4, 2, backend="reference")
    assert order.token.tolist() == [0, 2, 0, 1, 1, 2, 0, 1]  # slots 5, 6 and 7 are empty: tokens 5, 6, 7 modulo 3
    assert order.slot.tolist() == [[2, 0], [3, 4], [-1, 1]]
    assert (order.counts.tolist(), order.assigned.tolist(), int(order.dropped)) == ([2] * 4, [2, 3, 1, 0], 1)
    order = sort_by_expert(chosen, 4, backend="reference")
    assert order.token.tolist() == [0, 2, 0, 1, 2, 1] and order.slot.tolist() == [[2, 0], [3, 5], [4, 1]]
    assert order.counts.tolist() == [2, 3, 1, 0] and int(order.dropped) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("backend", "on"), BACKENDS)
def test_rows_and_gradients_equal_the_reference(backend: str, on: str, dtype: torch.dtype) -> None:
    if backend not in available("gather_rows", on, dtype):
        pytest.skip("not for this dtype")
    for d, strided in ((7, False), (24, True)):
        for tokens, order in orders(on):
            expected = results(order, tokens, d, torch.float64, "reference", strided)
            actual = results(order, tokens, d, dtype, backend, strided)
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                assert (actual[name].double() - value).norm() <= TOLERANCE[dtype] * value.norm(), name


@pytest.mark.parametrize(("backend", "on"), BACKENDS)
def test_many_columns_and_gradients_that_are_expanded(backend: str, on: str) -> None:
    """More columns than a program of the Triton version takes at once."""
    order = sort_by_expert(choices(5, 2, 3, on), 3, 2, backend="reference")
    given = torch.randn(5, 1300, device=on), torch.randn(6, 1300, device=on), torch.rand(6, device=on)
    found: list[list[Tensor]] = []
    for name in (backend, "reference"):
        x, rows, weight = (tensor.clone().requires_grad_() for tensor in given)
        total = gather_rows(x, order.token, order.slot, backend=name).sum()
        total = total + combine_rows(rows, weight, order.token, order.slot, backend=name).sum()
        found.append(list(torch.autograd.grad(total, [x, rows, weight])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str) -> None:
    for order, tokens in ((sort_by_expert(choices(4, 2, 3), 3, 2), 4), (expert_choice(4, 9, 2, "cpu"), 4)):
        filled = torch.isin(torch.arange(len(order.token)), order.slot)
        x, rows = torch.randn(tokens, 3).double(), torch.randn(len(filled), 3).double()
        weight = torch.rand(len(filled)).double() * filled

        def layer(x: Tensor, rows: Tensor, weight: Tensor, order: Order = order) -> Tensor:
            gathered = gather_rows(x, order.token, order.slot, backend=backend)
            return combine_rows(gathered * rows, weight, order.token, order.slot, backend=backend)

        inputs = tuple(tensor.requires_grad_() for tensor in (x, rows))
        assert torch.autograd.gradcheck(lambda *given, layer=layer, weight=weight: layer(*given, weight), inputs)


@pytest.mark.parametrize(("backend", "on"), BACKENDS)
def test_a_dropped_token_is_zero_whatever_the_others_hold(backend: str, on: str) -> None:
    order = sort_by_expert(torch.zeros(4, 1, dtype=torch.int64, device=on), 1, 2, backend="reference")
    rows = torch.full((2, 3), torch.nan, device=on)
    y = combine_rows(rows, torch.ones(2, device=on), order.token, order.slot, backend=backend)
    assert y[:2].isnan().all() and y[2:].eq(0).all()
    x = torch.zeros(4, 3, device=on, requires_grad=True)
    gather_rows(x, order.token, order.slot, backend=backend).backward(rows)
    assert x.grad is not None and x.grad[:2].isnan().all() and x.grad[2:].eq(0).all()


@pytest.mark.parametrize(("backend", "on"), BACKENDS)
def test_runs_are_equal_to_the_bit_with_any_number_of_threads(backend: str, on: str) -> None:
    if backend == "reference":
        pytest.skip("plain autograd adds up as it likes")
    order = sort_by_expert(choices(300, 2, 8, on), 8, 60, backend="reference")
    first = results(order, 300, 40, torch.float32, backend, False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for name, value in results(order, 300, 40, torch.float32, backend, False).items():
            assert torch.equal(first[name], value), name
    finally:
        torch.set_num_threads(threads)


class _NoValueRead(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or a shape that depends on one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique", "unique_dim")
        assert not name.startswith(reads), f"{function} reads a value"
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_with_a_capacity() -> None:
    chosen, experts, capacity = choices(30, 2, 4), 4, 13
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(4, 8, 8, requires_grad=True)
    shares = torch.rand(experts * capacity, requires_grad=True)
    with _NoValueRead():
        order = sort_by_expert(chosen, experts, capacity, backend="torch")
        rows = gather_rows(x, order.token, order.slot, backend="torch")
        rows = grouped_matmul(rows, weight, order.counts, capacity, backend="torch")
        y = combine_rows(rows, shares, order.token, order.slot, backend="torch")
        torch.autograd.grad(y.square().sum(), [x, weight, shares])
    for read in (lambda: order.dropped.item(), lambda: order.slot.nonzero()):
        with _NoValueRead(), pytest.raises(AssertionError, match="reads a value"):
            read()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda i, f: sort_by_expert(f, 2), "chosen is torch.float32, and must be torch.int64"),
        (lambda i, f: sort_by_expert(i[0], 2), r"chosen has shape \(2,\), and must be \(tokens, k\)"),
        (lambda i, f: sort_by_expert(i[:0], 2), r"chosen has shape \(0, 2\), and must hold a choice"),
        (lambda i, f: sort_by_expert(i, 0), "experts is 0, and must be 1 or more"),
        (lambda i, f: sort_by_expert(i, 2, 0), "capacity is 0, and must be 1 or more"),
        (lambda i, f: sort_by_expert(i, 2, backend="fast"), "no back end 'fast'"),
        (lambda i, f: gather_rows(f, i, i), r"token has shape \(3, 2\), and must be \(rows\)"),
        (lambda i, f: gather_rows(f, i[:, 0], i[:2]), r"slot has shape \(2, 2\), and must have \(3, 2\)"),
        (lambda i, f: gather_rows(f, i[:, 0].int(), i), "token is torch.int32, and must be torch.int64"),
        (lambda i, f: combine_rows(f, f[:2, 0], i[:, 0], i), r"weight has shape \(2,\), and must have \(3,\)"),
        (lambda i, f: combine_rows(f, i[:, 0], i[:, 0], i), "weight is torch.int64, and must be of floats"),
        (lambda i, f: combine_rows(f, f[:, 0], i[:, 0], f), "slot is torch.float32, and must be torch.int64"),
    ],
)
def test_bad_input_is_one_line(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        call(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    assert "\n" not in str(caught.value)
