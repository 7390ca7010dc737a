"""A picture of estimates: the memory of the fullest rank by kind, and where a step's time goes."""

import io
from collections.abc import Mapping, Sequence

from moe_mamba.planning.cluster import GIB
from moe_mamba.planning.estimate import Estimate
from moe_mamba.planning.report import NAMES


def draw(estimates: Sequence[tuple[str, Estimate]], form: str) -> bytes:
    """A picture with a bar for each of ``estimates``, (name, estimate).

    Args:
        estimates: what is drawn.
        form: of the picture: png, svg or pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.55 * len(estimates)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [name for name, _ in estimates]
    room = max(one.cluster.memory for _, one in estimates) / GIB
    bars = [{kind: count / GIB for kind, count in one.memory.at_peak.items()} for _, one in estimates]
    _stack(memory, names, bars)
    memory.axvline(room, color="black", linestyle="--", linewidth=1)
    memory.set_xlabel(f"GiB on the fullest GPU (it has {room:.0f})")
    parts = [part for part in NAMES if any(one.time.parts[part] > 0.002 * one.time.seconds for _, one in estimates)]
    shares = [{NAMES[part]: 100 * one.time.parts[part] / one.time.seconds for part in parts} for _, one in estimates]
    _stack(time, names, shares)
    for place, (_, one) in enumerate(estimates):
        time.text(101, place, f"{one.tokens_per_second:,.0f} tokens/s/GPU\nMFU {one.mfu:.0%}", va="center", fontsize=8)
    time.set_xlabel("share of a step's time, %")
    time.set_xlim(0, 150)
    time.set_xticks(range(0, 101, 20))
    memory.invert_yaxis()
    picture = io.BytesIO()
    figure.savefig(picture, format=form, dpi=110)
    return picture.getvalue()


def _stack(axes: object, names: Sequence[str], bars: Sequence[Mapping[str, float]]) -> None:
    """Stacked horizontal bars, with a legend above."""
    left = [0.0] * len(bars)
    for label in bars[0]:
        widths = [bar[label] for bar in bars]
        axes.barh(names, widths, left=left, label=label)  # type: ignore[attr-defined]
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7, frameon=False)  # type: ignore[attr-defined]
