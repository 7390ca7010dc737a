"""A picture of what experts specialise in: information by router, agreement of runs, load by place in the document."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_mamba.evaluation.expert_report import Read, Run
from moe_mamba.evaluation.information import Measure
from moe_mamba.evaluation.specialisation import Agreement
from moe_mamba.run.plots import COLORS, FAINT, GRID, INK

MOST_MAPS = 16  # routers whose loads are drawn, spread over the model


def draw(read: Read, runs: Sequence[Run], agreements: Sequence[Agreement], path: Path) -> None:
    """Draw everything into the PNG ``path``; loads by place are the first run's."""
    from matplotlib.figure import Figure

    labels = list(runs[0].routers)
    shown = [labels[place] for place in np.unique(np.linspace(0, len(labels) - 1, MOST_MAPS).round().astype(int))]
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(12, 3.6 + 2.2 * rows), dpi=130, layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.6, 2.2 * rows])
    top, bottom = parts
    axes = top.subplots(1, 2 + bool(agreements))
    token = {run.name: {label: router.token for label, router in run.routers.items()} for run in runs}
    place = {run.name: {label: router.position for label, router in run.routers.items()} for run in runs}
    _curves(axes[0], labels, token, "information of the expert about the token, bits")
    _curves(axes[1], labels, place, "about its place in the document, bits")
    if agreements:
        pairs = {", ".join(one.runs): one.routers for one in agreements}
        equal = {", ".join(one.runs): one.equal_tokens for one in agreements}
        _curves(axes[2], labels, pairs, "agreement (dashed: by chance among equal tokens)", equal)
    _maps(bottom, read, runs[0], shown)
    top.suptitle(f"What the experts specialise in: {read.tokens:,} tokens", fontsize=13, color=INK, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


Curves = dict[str, dict[str, Measure]]
"""Name -> label of the router -> figure."""


def _curves(axes: Any, labels: list[str], curves: Curves, title: str, others: Curves | None = None) -> None:
    """A curve over the routers for each name; what chance makes is dotted in its colour, ``others``' is dashed."""
    for number, (name, measures) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        places = [place for place, label in enumerate(labels) if label in measures]
        found = [measures[labels[place]] for place in places]
        axes.plot(places, [one.value for one in found], color=color, marker="o", markersize=4, label=name)
        axes.plot(places, [one.shuffled for one in found], color=color, linestyle=":", linewidth=1.2)
        if others is not None:
            dashed = [others[name][labels[place]].shuffled for place in places]
            axes.plot(places, dashed, color=color, linestyle="--", linewidth=1)
    step = -(-len(labels) // 12)
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=45 * (len(labels) > 8))
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel("router (dotted: by chance)", color=FAINT, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if 1 < len(curves) <= 10:
        axes.legend(fontsize=7, frameon=False, labelcolor=FAINT)


def _maps(figure: Any, read: Read, run: Run, labels: list[str]) -> None:
    """Load of each expert by place in the document, against its load as a whole, on a doubling scale."""
    columns = min(4, len(labels))
    maps = list(figure.subplots(-(-len(labels) // columns), columns, squeeze=False).flat)
    for axes, label in zip(maps, labels, strict=False):
        load = np.array([expert.positions for expert in run.routers[label].experts], dtype=np.float64)
        picture = axes.pcolormesh(np.log2(np.maximum(load, 1e-3)), cmap="coolwarm", vmin=-1.5, vmax=1.5)
        step = -(-len(read.buckets) // 6)
        axes.set_xticks(np.arange(0, len(read.buckets), step) + 0.5, [f"{start}" for start in read.buckets[::step]])
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(colors=FAINT, labelsize=7, length=0)
        axes.set_title(f"router {label}", fontsize=9, color=INK, loc="left")
    for axes in maps[len(labels) :]:
        axes.set_visible(False)
    bar = figure.colorbar(picture, ax=maps, ticks=[-1, 0, 1], aspect=20, pad=0.01, extend="both")
    bar.ax.set_yticklabels(["half", "even", "double"], fontsize=8, color=FAINT)
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{run.name}: load of the experts by place in the document", fontsize=10, color=INK, x=0.01, ha="left"
    )
    figure.supylabel("expert", fontsize=9, color=FAINT)
