"""The scan's Triton kernels, in the interpreter where there is no GPU: intervals, chunks, segments, offsets, widths."""

import pytest
import torch

from moe_mamba.kernels import requirements, selective_scan
from moe_mamba.kernels.selective_scan import triton_selective_scan as entry
from moe_mamba.kernels.selective_scan.triton_selective_scan import _Launch
from tests.kernels.available import device
from tests.kernels.test_selective_scan import TOLERANCE, assert_equal, operands, results

ON = device()
pytestmark = [
    pytest.mark.skipif(requirements.triton() is not None, reason="Triton runs neither on a GPU nor interpreted"),
    *([pytest.mark.gpu] if ON == "cuda" else []),
]


@pytest.fixture
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept state every 8 steps, so that short sequences have several."""
    monkeypatch.setattr(entry, "INTERVAL", 8)


@pytest.mark.parametrize(
    ("shape", "optional", "dtype"),
    [
        ((2, 17, 5, 3), True, torch.float32),
        ((1, 9, 33, 3), False, torch.float32),  # two blocks of channels
        ((1, 8, 32, 4), True, torch.float32),  # every block is full
        ((1, 3, 2, 33), True, torch.float32),  # several warps
        ((1, 5, 5, 3), True, torch.bfloat16),
        ((1, 5, 5, 3), True, torch.float16),
    ],
)
@pytest.mark.usefixtures("short_intervals")
def test_equals_the_reference(shape: tuple[int, ...], optional: bool, dtype: torch.dtype) -> None:
    made = operands(*shape, optional)
    expected = results(made, None, torch.float64, "reference")
    assert_equal(results(made, None, dtype, "triton", ON), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("places", [(3, 8), (4, 7)])
@pytest.mark.usefixtures("short_intervals")
def test_starts_beside_the_edges_of_chunks(places: tuple[int, ...]) -> None:
    made, document_starts = operands(1, 10, 3, 2), torch.zeros(1, 10, dtype=torch.bool)
    document_starts[0, list(places)] = True
    expected = results(made, document_starts, torch.float64, "reference")
    assert_equal(results(made, document_starts, torch.float32, "triton", ON), expected, 1e-5)


@pytest.mark.parametrize(
    ("segments", "starts_at", "optional"), [(2, (), False), (3, (3, 16), True), (3, (10, 11), True)]
)
@pytest.mark.usefixtures("short_intervals")
def test_segments_change_nothing(
    monkeypatch: pytest.MonkeyPatch, segments: int, starts_at: tuple[int, ...], optional: bool
) -> None:
    monkeypatch.setattr(entry, "SEGMENTS", segments)
    made = operands(1, 19, 5, 3, optional)
    document_starts = torch.zeros(1, 19, dtype=torch.bool)
    document_starts[0, list(starts_at)] = True
    expected = results(made, document_starts, torch.float64, "reference")
    assert_equal(results(made, document_starts if starts_at else None, torch.float32, "triton", ON), expected, 1e-5)


@pytest.mark.usefixtures("short_intervals")
def test_nan_does_not_cross_a_start_in_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "SEGMENTS", 3)
    made = operands(1, 19, 3, 2)
    document_starts = torch.zeros(1, 19, dtype=torch.bool)
    document_starts[0, 10] = True
    for name in ("x", "delta"):
        made[name][0, 5] = torch.nan
    actual = results(made, document_starts, torch.float32, "triton", ON)
    expected = results(made, document_starts, torch.float64, "reference")
    assert torch.equal(actual["y"].isnan(), expected["y"].isnan())
    assert actual["final state"].isfinite().all() and actual["gradient of x"][:, 10:].isfinite().all()


def test_a_full_gpu_gets_one_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 17,000 batch x channels, a GPU of 132 multiprocessors has room for more programs."""

    class Stand:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    launches = {(batch, length): _Launch.of(Stand(batch, length, 1536), torch.zeros(1536, 16))  # type: ignore[arg-type]
                for batch, length in ((32, 1024), (12, 1024), (11, 1024), (4, 8192), (1, 256))}  # fmt: skip
    assert {shape: launch.segments for shape, launch in launches.items()} == {
        (32, 1024): 1,
        (12, 1024): 1,
        (11, 1024): 2,
        (4, 8192): 5,
        (1, 256): 2,
    }


@pytest.mark.skipif(ON == "cuda", reason="takes 13 GB of addresses, which only a CPU gives without memory behind them")
def test_offsets_pass_two_to_the_31() -> None:
    """Rows 2^31 and time steps 2^29 elements apart: only pages that are touched take memory."""
    row, step, length, channels = 2**31 + 64, 2**29 + 32, 5, 3
    room = torch.empty(row + length * step, dtype=torch.float16)
    x = room.as_strided((2, length, channels), (row, step, 1))
    x.copy_(torch.randn(x.shape))
    made = {name: value.float() for name, value in operands(2, length, channels, 2, optional=False).items()}
    half = {name: made[name].half() for name in ("delta", "B", "C")}
    y, _ = selective_scan(x, half["delta"], made["A"], half["B"], half["C"], made["D"], backend="triton")
    expected, _ = selective_scan(x.clone(), half["delta"], made["A"], half["B"], half["C"], made["D"], backend="torch")
    torch.testing.assert_close(y, expected)


def test_keeps_one_state_in_32_and_none_without_gradients() -> None:
    kept: list[torch.Tensor] = []
    made = {name: value.float().to(ON) for name, value in operands(1, 33, 2, 2, optional=False).items()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = selective_scan(**made, backend="triton")
        assert not kept and not y.requires_grad
        made["A"].requires_grad_()
        selective_scan(**made, backend="triton")
    given = {tensor.data_ptr() for tensor in made.values()}
    new = sorted(tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given)
    assert new == [(0,), (1, 2, 2, 2)]  # the kept states, and no sums, since there is one segment
