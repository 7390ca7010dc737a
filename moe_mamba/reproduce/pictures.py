"""Pictures of a table, after the paper's Figures 1 and 3: loss over tokens, and loss over the table's axis."""

from pathlib import Path
from typing import Any

from moe_mamba.reproduce.gathering import Result, RowResult
from moe_mamba.run.plots import COLORS, FAINT, GRID, INK

FIRST_SHOWN = 0.1  # share of the run from which on losses are in the picture: the first fall would flatten the rest


def draw_tokens(result: Result, path: Path) -> bool:
    """Validation loss over tokens, the mean of the seeds in a band from the lowest to the highest; False: no curve."""
    rows = [row for row in result.rows.values() if row.traces]
    if not rows:
        return False
    figure, axes = _figure()
    lowest, highest = [], []
    for number, row in enumerate(rows):
        color = _color(number)
        per_step = next(iter(row.traces.values())).tokens_per_step
        tokens = [step * per_step for step in row.curve]
        losses = list(row.curve.values())
        means = [sum(values) / len(values) for values in losses]
        axes.plot(tokens, means, color=color, linewidth=1.8, marker="o", markersize=2.5, label=_label(result, row))
        axes.fill_between(tokens, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.2, linewidth=0)
        shown = [mean for token, mean in zip(tokens, means, strict=True) if token >= FIRST_SHOWN * tokens[-1]]
        lowest.append(min(shown))
        highest.append(max(shown))
    margin = 0.03 * (max(highest) - min(lowest)) or 0.01
    axes.set_ylim(min(lowest) - margin, max(highest) + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_in_words())
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats/token")
    axes.legend(frameon=False, fontsize=9)
    _save(figure, axes, f"{result.workspace.table.experiment.title}: loss over tokens", path)
    return True


def draw_axis(result: Result, path: Path) -> bool:
    """Loss over the table's axis, a line for each series, references as levels; False: it has no such axis."""
    table = result.workspace.table
    series: dict[str, list[tuple[float, RowResult]]] = {}
    for name, row in result.rows.items():
        spec = table.rows[name]
        if spec.at is not None and row.loss is not None:
            series.setdefault(spec.series, []).append((spec.at, row))
    if not any(len(points) > 1 for points in series.values()):
        return False
    figure, axes = _figure()
    for number, (name, points) in enumerate(series.items()):
        points.sort(key=lambda point: point[0])
        places = [at for at, _ in points]
        means = [row.loss for _, row in points if row.loss is not None]
        errors = [mean.error or 0.0 for mean in means]
        values = [mean.value for mean in means]
        axes.errorbar(places, values, errors, color=_color(number), marker="o", capsize=3, label=name or "ours")
    for number, name in enumerate(_levels(result)):
        level, color = result.rows[name].loss, (INK, FAINT)[number % 2]
        assert level is not None
        label = f"{table.rows[name].title}, the reference"
        axes.axhline(level.value, color=color, linestyle="--", linewidth=1.2, label=label)
        if level.error:
            axes.axhspan(level.value - level.error, level.value + level.error, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({at for points in series.values() for at, _ in points})
    axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
    axes.set_xlabel(table.experiment.axis)
    axes.set_ylabel("validation loss, nats/token")
    axes.legend(frameon=False, fontsize=9)
    _save(figure, axes, f"{table.experiment.title}: loss over {table.experiment.axis}", path)
    return True


def _levels(result: Result) -> list[str]:
    """References of the rows on the axis that are no points of it themselves."""
    table = result.workspace.table
    names = dict.fromkeys(table.reference_of(name) for name in result.rows if table.rows[name].at is not None)
    return [name for name in names if table.rows[name].at is None and name in result.rows and result.rows[name].loss]


def _label(result: Result, row: RowResult) -> str:
    count = len(row.traces)
    return f"{result.workspace.table.rows[row.name].title} ({count} seed{'s' * (count != 1)})"


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _in_words() -> Any:
    """Writes 5 M for 5000000."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _save(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title, parse_math=False, loc="left", fontsize=12, weight="bold", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=FAINT, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
