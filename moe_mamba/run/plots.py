"""Pictures of runs: loss over tokens, and the load of the experts. Drawn without a display."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_mamba.errors import UserError
from moe_mamba.run.metrics import FILE, read_metrics

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#475569")
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
SMOOTHING = 0.02  # a point of the smooth curve is the mean of so large a share of the points on each side
COLUMNS = 300  # a heat map has at most so many columns: more steps are averaged

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]  # tokens, loss


def plot_loss(runs: Mapping[str, str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Draw training and validation loss of `runs` (name -> folder) over the tokens seen, into the PNG `output`.

    One run has its training and validation curves in colours of their own; of several, each run has a colour, its
    training loss a line and its validation loss dots in it.

    Raises:
        UserError: a run has no metrics, or no loss yet; `output` cannot be written.
    """
    figure, axes = _figure(10, 5.6)
    labels: list[tuple[float, str, str]] = []
    curves: list[Curve] = []
    for number, (name, folder) in enumerate(runs.items()):
        training, validations = _curves(folder)
        curves += [(training[0], _smooth(training[1])), *validations.values()]
        color = COLORS[number % len(COLORS)]
        tokens, loss = training
        smooth = _smooth(loss)
        axes.plot(tokens, loss, color=color, alpha=0.18, linewidth=0.8)
        axes.plot(tokens, smooth, color=color, linewidth=2, solid_capstyle="round")
        labels.append((smooth[-1], f"{name if len(runs) > 1 else 'training'}  {smooth[-1]:.2f}", color))
        for index, (set_name, curve) in enumerate(validations.items()):
            dots = COLORS[(index + 1) % len(COLORS)] if len(runs) == 1 else color
            marker = "osD^v"[index % 5]
            width = 1.2 if len(runs) == 1 else 0
            axes.plot(*curve, color=dots, linewidth=width, marker=marker, markersize=5.5, markeredgecolor="white")
            if len(runs) == 1:
                labels.append((curve[1][-1], f"{set_name}  {curve[1][-1]:.2f}", dots))
    _frame_losses(axes, curves)
    _label_ends(axes, labels)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats/token")
    title = f"Loss of {next(iter(runs))}" if len(runs) == 1 else "Loss"
    note = "line: training, smoothed    faint: every step" + ("    dots: validation" if len(runs) > 1 else "")
    _title(axes, title, note)
    _save(figure, output)


def plot_expert_load(run: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Draw the share of tokens that each expert of each MoE layer gets over a run, into the PNG `output`.

    Colours say how the share compares with an even one: grey even, red above, blue below. Two curves beneath, where
    the run logged them: tokens dropped, and the router's entropy as a share of its maximum.

    Raises:
        UserError: the run has no metrics, or no experts; `output` cannot be written.
    """
    lines = [line for line in read_metrics(run) if line.get("expert_load") and "tokens" in line]
    if not lines:
        raise UserError(f"{Path(run)} logged no expert_load: its model has no experts, or it has not trained yet")
    experts = {layer: len(load) for layer, load in lines[0]["expert_load"].items()}
    for line in lines:
        if {layer: len(load) for layer, load in line["expert_load"].items()} != experts:
            path = Path(run) / FILE
            raise UserError(
                f"{path}: step {line['step']:,} has other experts than step {lines[0]['step']:,}: remove it"
            )
    layers = sorted(experts, key=lambda layer: ([int(number) for number in re.findall(r"\d+", layer)], layer))
    columns = min(len(layers), math.ceil(math.sqrt(len(layers))))
    rows = -(-len(layers) // columns)
    figure, _ = _figure(max(10, 3.4 * columns), 1.6 + 2.1 * rows + 2.2, axes=False)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.0 + 2.1 * rows, 2.4])
    is_alike = len(set(experts.values())) == 1
    maps = list(top.subplots(rows, columns, squeeze=False, sharex=True, sharey=is_alike).flat)
    tokens = np.array([line["tokens"] for line in lines], dtype=np.float64)
    for layer, axes in zip(layers, maps, strict=False):
        load = np.array([line["expert_load"][layer] for line in lines], dtype=np.float64).T
        picture = _heat_map(axes, tokens, load * len(load))
        axes.set_title(f"layer {layer}", fontsize=10, color=INK, loc="left")
    for axes in maps[len(layers) :]:
        axes.set_visible(False)
    bar = top.colorbar(
        picture, ax=maps, ticks=[-1, 0, 1], aspect=30, shrink=min(1, 1.6 / rows), pad=0.015, extend="both"
    )
    bar.ax.set_yticklabels(["half", "even", "double"], fontsize=9, color=FAINT)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    top.suptitle(f"Load of the experts of {Path(run).name}", x=0.01, ha="left", fontsize=14, weight="bold", color=INK)
    top.supylabel("expert", fontsize=10, color=FAINT)
    _router_curves(bottom, lines, {layer: experts[layer] for layer in layers}, tokens)
    _save(figure, output)


def _router_curves(figure: Any, lines: list[dict[str, Any]], layers: dict[str, int], tokens: Floats) -> None:
    """Dropped tokens and entropy of the router, a curve per layer, lighter to darker with depth.

    Args:
        figure: where to.
        lines: of the metrics.
        layers: name of each router in them -> its experts.
        tokens: of each line.
    """
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.85, 0.15, len(layers)))
    quantities = (
        ("dropped", "tokens dropped", lambda experts: 1.0),
        ("router_entropy", "entropy of the router, of its maximum", math.log),
    )
    for axes, (key, title, scale) in zip(figure.subplots(1, 2), quantities, strict=True):
        for layer, shade in zip(layers, shades, strict=True):
            values = [line.get("moe", {}).get(key, {}).get(layer) for line in lines]
            curve = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
            curve = _smooth(curve) / max(scale(layers[layer]), 1e-9)
            axes.plot(tokens, curve, color=shade, linewidth=1.6, label=f"layer {layer}")
        _style(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.set_xlim(0, tokens[-1])
        axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 0.02))
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("tokens")
    if 1 < len(layers) <= 8:
        axes.legend(fontsize=8, frameon=False, labelcolor=FAINT, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _heat_map(axes: Any, tokens: Floats, relative: Floats) -> Any:
    """Draw loads relative to an even one, experts x lines, on a doubling scale."""
    groups = np.array_split(np.arange(len(tokens)), min(COLUMNS, len(tokens)))
    means = np.stack([relative[:, group].mean(1) for group in groups], 1)
    edges = np.concatenate([[0.0], tokens[[group[-1] for group in groups]]])
    picture = axes.pcolormesh(
        edges,
        np.arange(len(relative) + 1) - 0.5,
        np.log2(np.maximum(means, 1e-3)),
        cmap="coolwarm",
        vmin=-1.5,
        vmax=1.5,
        rasterized=True,
    )
    axes.xaxis.set_major_formatter(_short)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return picture


def _curves(folder: str | os.PathLike[str]) -> tuple[Curve, dict[str, Curve]]:
    """Training loss, and the loss of each validation set, of a run."""
    lines = [line for line in read_metrics(folder) if "tokens" in line]
    training = [(line["tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not training:
        raise UserError(f"{Path(folder)} has no loss yet: train at least one step")
    sets: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, scores in line.get("validation", {}).items():
            if scores.get("loss") is not None:
                sets.setdefault(name, []).append((line["tokens"], scores["loss"]))
    return _curve(training), {name: _curve(points) for name, points in sets.items()}


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    tokens, loss = np.array(points, dtype=np.float64).T
    return tokens, loss


def _smooth(values: Floats) -> Floats:
    """Mean over a window around each point; it is narrow at the start, where the loss falls steeply."""
    place = np.arange(len(values))
    before = np.minimum(place // 3, max(1, round(SMOOTHING * len(values))))
    start, stop = place - before, np.minimum(place + before + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[stop] - sums[start]) / (stop - start)


def _figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    if not axes:
        return figure, None
    plot = figure.add_subplot()
    _style(plot)
    return figure, plot


def _style(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.xaxis.label.set_color(FAINT)
    axes.yaxis.label.set_color(FAINT)
    axes.xaxis.set_major_formatter(_short)
    axes.margins(x=0)


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, weight="bold", color=INK, pad=24)
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color=FAINT, va="bottom")


def _frame_losses(axes: Any, curves: Sequence[Curve]) -> None:
    """Leave the first, steep fall out of the picture: the rest would be flat beside it."""
    lowest, highest, last = axes.dataLim.y0, axes.dataLim.y1, axes.dataLim.x1
    usual = max(float(loss[tokens >= min(last / 50, tokens[-1])].max()) for tokens, loss in curves)
    top = min(highest, usual + 0.05 * (usual - lowest))
    margin = max(0.03 * (top - lowest), 1e-3)
    axes.set_ylim(lowest - margin, top + margin)
    axes.set_xlim(0, 1.005 * last)


def _label_ends(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Write each curve's name and last value beside its end, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.05 * (top - bottom)
    ordered = sorted(labels)
    places: list[float] = []
    for value, _, _ in ordered:
        places.append(max(value, places[-1] + gap) if places else value)
    over = max(0.0, places[-1] - top)
    for place, (_, text, color) in zip(places, ordered, strict=True):
        axes.annotate(
            text,
            (1, place - over),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            fontsize=10,
            weight="bold",
            va="center",
            annotation_clip=False,
        )


def _short(value: float, _: object = None) -> str:
    """1500000 -> 1.5M."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def _save(figure: Any, output: str | os.PathLike[str]) -> None:
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({error}): give another --output") from None
