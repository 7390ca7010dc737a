"""A trace of a few steps, to be opened in Perfetto or in Chrome's about:tracing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from moe_mamba.parallel.topology import World

# The first steps allocate and compile; they would hide what every other step costs.
WARMUP_STEPS = 2


class _NoProfiler:
    def step(self) -> None:
        """Nothing is traced."""


Trace = torch.profiler.profile | _NoProfiler


@contextlib.contextmanager
def profiler(steps: int, folder: Path, world: World) -> Iterator[Trace]:
    """Trace `steps` steps of this process, after two that warm up, into `folder`; `step()` marks a step's end."""
    if not steps:
        yield _NoProfiler()
        return
    folder.mkdir(parents=True, exist_ok=True)

    def export(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"rank-{world.rank}.json"))
        by_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by_time, row_limit=40)
        (folder / f"rank-{world.rank}.txt").write_text(table, encoding="utf-8")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    schedule = torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=export) as profile:
        yield profile
