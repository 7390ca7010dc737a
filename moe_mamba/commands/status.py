"""Say how a run stands: whether it works, how far it is, and what happened to it."""

from datetime import timedelta
from pathlib import Path

from moe_mamba.run.status import Status, read_status

REASONS_SHOWN = 3
LONGEST = 1e12  # seconds: a damaged file may say more than a timedelta holds


def main(run: str) -> None:
    """Say in one screen how a run stands, from its folder alone, on any machine that sees it.

    Args:
        run: the run's folder, such as runs/demo.
    """
    print("\n".join(f"{name:<12}{text}" for name, text in describe(run, read_status(Path(run)))))


def describe(run: str, status: Status) -> list[tuple[str, str]]:
    """The lines for a person: name and text."""
    lines = [("run", f"{run}: {_state(status)}")]
    if status.ages:
        lines.append(("heartbeats", ", ".join(f"{host} {_duration(age)} ago" for host, age in _oldest(status.ages))))
    of = f" of {status.steps:,} ({100 * status.step / status.steps:.1f}%)" if status.steps else ""
    left = "" if status.seconds_left is None else f", about {_duration(status.seconds_left)} left"
    lines.append(("steps", f"{status.step:,}{of}{left}"))
    if status.loss is not None:
        lines.append(("loss", f"{status.loss:.4f} nats/token{_trend(status)}"))
    if status.validation is not None:
        step, losses = status.validation
        sets = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        lines.append(("validation", f"{sets} at step {step:,}"))
    counts = f"{status.nan:,} NaN, {status.spikes:,} spikes"
    lines.append(("trouble", f"{counts}; {status.left_out:,} batches left out, {status.rewinds:,} rewinds"))
    lines += _restarts(status.restarts)
    if status.goodput is not None:
        lines.append(("goodput", f"{100 * status.goodput:.0f}% of the wall time made steps that are kept"))
    lines.append(("checkpoint", str(status.checkpoint) if status.checkpoint else "none yet"))
    lines += [
        ("slow", f"{host}: rank {rank} computes {times:.2f} times as long as the usual rank")
        for rank, host, times in status.slow
    ]
    if status.stalled is not None:
        host, share = status.stalled
        lines.append(("data", f"steps waited {100 * share:.0f}% of their time for data, longest on {host}"))
    return lines + [("damaged", text) for text in status.damaged]


def _state(status: Status) -> str:
    return {
        "runs": "it runs",
        "silent": f"it should run, but there is no sign of life from {status.why}",
        "finished": "finished",
        "stopped": f"it does not run: {status.why}",
        "died": f"it does not run: {status.why}",
        "begins": "it begins: no step was begun since it was started",
    }[status.state]


def _oldest(ages: dict[str, float]) -> list[tuple[str, float]]:
    """The machines whose signs of life are the oldest, a few of them."""
    return sorted(ages.items(), key=lambda item: -item[1])[:4]


def _trend(status: Status) -> str:
    if status.trend is None:
        return ""
    before, after = status.trend
    side = "falling" if after < before else "rising"
    return f", {side}: mean {before:.4f}, then {after:.4f} over the last steps"


def _restarts(reasons: list[str]) -> list[tuple[str, str]]:
    hidden = len(reasons) - REASONS_SHOWN
    lines = [("restarts", f"{len(reasons):,}{f', the last {REASONS_SHOWN}:' if hidden > 0 else ''}")]
    return lines + [("", reason) for reason in reasons[-REASONS_SHOWN:]]


def _duration(seconds: float) -> str:
    """75 -> 1 min; 90000 -> 1 d 1 h."""
    whole = timedelta(seconds=round(min(max(0, seconds), LONGEST)))
    hours, rest = divmod(whole.seconds, 3600)
    if whole.days:
        return f"{whole.days} d {hours} h"
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min" if rest >= 60 else f"{rest} s"
