"""Presets, figures from command lines, and a cluster from what a preflight measured."""

import json
from pathlib import Path

import pytest
import torch

from moe_mamba.errors import UserError
from moe_mamba.planning.cluster import PRESETS, Cluster, Curve, Link
from moe_mamba.planning.devices import peak_flops
from moe_mamba.planning.figures import change
from moe_mamba.preflight.measured import cluster_of
from tests.preflight.made_up import ranks


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_peaks_of_their_makers(name: str) -> None:
    cluster, gpu = Cluster.of(name), name.partition("-")[0].upper()
    assert (cluster.bf16, cluster.fp32) == (peak_flops(gpu, torch.bfloat16), peak_flops(gpu, torch.float32))
    assert cluster.memory_rate > cluster.inside.rate > cluster.between.rate


def test_a_cluster_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"cluster='h300' is not known: give a100-80, h100, h200, b200"):
        Cluster.of("h300")


def test_figures_replace_those_of_a_preset() -> None:
    cluster = change(
        Cluster.of("h100"), {"memory_gib": "96", "inside_gbs": 100, "between_us": 5, "gpus_per_machine": 4}
    )
    assert (cluster.memory, cluster.gpus_per_machine) == (96 * 2**30, 4)
    assert cluster.inside == Link(100e9, Cluster.of("h100").inside.latency)
    assert cluster.between == Link(Cluster.of("h100").between.rate, pytest.approx(5e-6))
    assert cluster.bf16 == Cluster.of("h100").bf16
    assert change(Cluster.of("h100"), {}) == Cluster.of("h100")


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({"memory": 96}, r"--cluster\.memory is no figure of a cluster: there are gpus_per_machine, memory_gib"),
        ({"memory_gib": "much"}, r"--cluster\.memory_gib='much': give a number from"),
        ({"gpus_per_machine": 0}, r"--cluster\.gpus_per_machine=0: give an integer from 1"),
    ],
)
def test_figures_that_are_none_are_refused(figures: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        change(Cluster.of("h100"), figures)


def test_a_curve_goes_through_its_points_and_on_at_their_ends() -> None:
    curve = Curve(((10.0, 1.0), (100.0, 10.0), (1000.0, 40.0)))
    assert [curve.at(size) for size in (1, 10, 100, 1000)] == pytest.approx([1, 1, 10, 40])
    assert curve.at(31.6228) == pytest.approx(3.16228)
    assert curve.at(10_000) == pytest.approx(160)  # four times as much for ten times the size


@pytest.mark.parametrize(
    ("kind", "ranks", "inside", "between"),
    [
        # bytes that a ring moves on each rank, by the rate that is reached
        ("all-gather", range(8), 7 / 8 / 450, 0),
        ("all-reduce", range(8), 2 * 7 / 8 / 450, 0),
        ("reduce-scatter", range(0, 32, 8), 0, 3 / 4 / 50),
        ("all-reduce", range(16), 2 * 7 / 8 / 450, 2 / 8 * 1 / 2 / 50),
        ("all-to-all", range(16), 7 / 16 / 450, 8 / 16 / 50),
    ],
)
def test_collectives_take_what_their_bytes_take(kind: str, ranks: range, inside: float, between: float) -> None:
    cluster = change(Cluster.of("h100"), {"inside_us": 1e-6, "between_us": 1e-6})
    found = cluster.collective_seconds(kind, 0.8e9, 1, ranks)
    assert found == pytest.approx((inside, between), rel=1e-6)


def test_each_call_has_its_latency() -> None:
    cluster = Cluster.of("h100")
    one, ten = (cluster.collective_seconds("all-reduce", 1e3, calls, range(16)) for calls in (1, 10))
    assert ten[1] - one[1] == pytest.approx(9 * cluster.between.latency)
    assert ten[0] - one[0] == pytest.approx(9 * 3 * cluster.inside.latency)


def report(**changes: object) -> dict[str, object]:
    """A preflight of two ranks."""
    measures: dict[str, object] = {
        "sizes": {
            "tokens": 1024,
            "dtype": "float32",
            "matmul": [1024, 256, 512],
            "copy_bytes": 1 << 26,
            "scan": [4, 256, 512, 16],
            "grouped": None,
            "is_whole": True,
        },
        "compute": [
            {
                "rank": rank,
                "machine": "a",
                "matmul_flops": 5e10,
                "copy_bytes": 1e10,
                "scan_tokens": 4e4,
                "grouped_flops": None,
                "memory_bytes": 2**34,
            }
            for rank in range(2)
        ],
        "storage": [{"machine": "a", "bytes": 1, "write_bytes": 2e8, "read_bytes": 1e9}],
        "links": [],
        "collectives": [],
        "curves": [
            {"what": "product", "ranks": 1, "points": [[16, 1e10], [256, 5e10]]},
            {"what": "pass", "ranks": 1, "points": [[4096, 5e-6], [1048576, 1e-4]]},
            {"what": "all-reduce", "ranks": 2, "points": [[1024, 1e-4], [1048576, 1e-3]]},
        ],
    }
    base: dict[str, object] = {
        "made": "2026-01-01T00:00:00",
        "seconds": 1.0,
        "world_size": 2,
        "machines": {"a": [0, 1]},
        "checkpoint_bytes": None,
        "findings": [],
        "ranks": [json.loads(one.model_dump_json()) for one in ranks({}, {})],
        "clocks": [],
        "folders": [],
        "measures": measures,
    }
    return base | changes


def test_a_preflight_is_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "preflight.json"
    path.write_text(json.dumps(report()), encoding="utf-8")
    cluster = cluster_of(path)
    assert not cluster.is_gpu
    assert (cluster.gpus_per_machine, cluster.memory, cluster.disk_rate) == (2, 2**34, 2e8)
    assert cluster.plain == 4e4 * 512 * 16 * 27
    assert cluster.product_rate(False, 16, 0.1) == 1e10  # what is reached was measured
    assert cluster.product_rate(False, 4096, 1.0) == 5e10  # and nothing beyond it is believed
    assert cluster.peak(False) == 5e10  # MFU is of the fastest, whatever it is
    assert change(cluster, {"plain_tflops": 0.09}).peak(False) == pytest.approx(9e10)
    assert cluster.collective_seconds("all-reduce", 10 * 1048576, 10, range(2)) == pytest.approx((1e-2, 0))
    # of a group twice as large each rank moves 3/4 of the bytes in the place of 1/2
    assert cluster.collective_seconds("all-reduce", 1048576, 1, range(4))[1] == pytest.approx(1.5e-3)


def test_a_measured_gpu_has_the_peak_of_its_data_sheet(tmp_path: Path) -> None:
    path = tmp_path / "preflight.json"
    path.write_text(json.dumps(report()).replace('"cpu"', '"NVIDIA H100 80GB HBM3"'), encoding="utf-8")
    cluster = cluster_of(path)
    assert cluster.is_gpu
    assert [cluster.peak(is_half) for is_half in (True, False)] == [989e12, 67e12]
    assert cluster.product_rate(True, 16, 1.0) == 1e10


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, r"cannot be read .*: run launch/preflight\.py first"),
        ("{}", r"is no preflight's report \('made': "),
        (json.dumps(report(measures=None)), "has findings and no measures"),
        (json.dumps(report()).replace('"product"', '"pass"'), "has no curves of speed over sizes"),
    ],
)
def test_what_is_no_preflight_is_refused(tmp_path: Path, text: str | None, line: str) -> None:
    path = tmp_path / "preflight.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=line):
        cluster_of(path)
