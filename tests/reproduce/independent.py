"""A table computed again from raw metrics, by code that shares nothing with the tool."""

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

T = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764}  # Student's t by the number of seeds: 95 %, two-sided


def raw(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    """Steps and validation losses of a run."""
    return [(line["step"], line["validation_loss"]) for line in raw(folder) if "validation_loss" in line]


def check_table(output: Path, folder: Path, references: dict[str, str], runs: str = "runs") -> None:
    """Compare a table with the runs that it was made of.

    Args:
        output: where the runs lie.
        folder: of the table: table.json and table.md.
        references: row -> the row that it is compared with; its own name, or none, where it is compared with nothing.
        runs: the folder of the runs inside output.
    """
    found = json.loads((folder / "table.json").read_text())
    text = (folder / "table.md").read_text()
    for row, said in found["rows"].items():
        curves = _curves(output / runs / row)
        assert sorted(said["seeds"]) == sorted(curves), row
        if not curves:
            assert said["loss"] is None
            continue
        losses = {seed: points[-1][1] for seed, points in curves.items()}
        assert {seed: one["loss"] for seed, one in said["seeds"].items()} == losses
        value, error = mean(losses.values()), _error(list(losses.values()))
        assert said["loss"] == pytest.approx({"value": value, "error": error, "seeds": len(losses)})
        assert (f"| {value:.4f} ± {error:.4f} |" if error else f"| {value:.4f} |") in text
        _check_load(said, output / runs / row, max(curves.values())[-1][0])
        reference = references.get(row, row)
        if reference == row:
            assert said["difference"] is None
        else:
            _check_difference(said, curves, _curves(output / runs / reference), text)


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {seed.name.removeprefix("seed"): curve(seed) for seed in sorted(folder.glob("seed*"))}


def _error(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _check_difference(
    said: dict[str, Any],
    curves: dict[str, list[tuple[int, float]]],
    others: dict[str, list[tuple[int, float]]],
    text: str,
) -> None:
    both = sorted(set(curves) & set(others))
    apart = [curves[seed][-1][1] - others[seed][-1][1] for seed in both]
    assert said["difference"]["value"] == pytest.approx(mean(apart))
    assert said["difference"]["seeds"] == len(both)
    if len(both) > 1:
        reach = T[len(both)] * stdev(apart) / math.sqrt(len(both))
        ends = {"low": mean(apart) - reach, "high": mean(apart) + reach}
        assert {key: said["difference"][key] for key in ends} == pytest.approx(ends, rel=1e-4)
        assert f"{mean(apart):+.4f} ({ends['low']:+.4f} to {ends['high']:+.4f})" in text
    else:
        assert f"{apart[0]:+.4f} (one seed)" in text
    for seed in both:
        share = first_below(curves[seed], others[seed][-1][1])
        assert said["seeds"][seed]["share_of_steps"] == (share if share is None else pytest.approx(share))


def first_below(points: list[tuple[int, float]], target: float) -> float | None:
    """Steps to a loss by a walk along the curve, as a share of its steps."""
    last = points[-1][0]
    if points[0][1] <= target:
        return points[0][0] / last
    for (start, high), (end, low) in pairwise(points):
        if low <= target:
            return (start + (end - start) * (high - target) / (high - low)) / last
    return None


def _check_load(said: dict[str, Any], folder: Path, steps: int) -> None:
    loads = [
        len(load) * max(load)
        for seed in sorted(folder.glob("seed*"))
        for line in raw(seed)
        if line["step"] > 0.9 * steps
        for load in line.get("expert_load", {}).values()
    ]
    assert said["fullest_expert"] == (pytest.approx(mean(loads), rel=1e-4) if loads else None)
