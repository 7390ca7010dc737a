"""Slow ranks and slow data are told from what ranks measure of themselves, once."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.train import train
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.parallel.waiting import Waiting
from moe_mamba.run.console import Screen
from moe_mamba.run.events import Events, read_events
from moe_mamba.run.metrics import read_metrics
from moe_mamba.train.pace import DELAY, MEASUREMENTS, Pace
from moe_mamba.train.reading import Moment
from tests.train.seams import stepping_in
from tests.world import World

HOSTS = ["a", "a", "b", "b"]


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pace:
    screen = Screen(tmp_path / "log.txt")
    monkeypatch.setattr(screen, "say", print)
    return Pace(Topology(Ranks(0, 4, 0, 2)), 1, HOSTS, screen, Events(tmp_path, enabled=True))


def feed(pace: Pace, compute: list[float], data: float = 0.0, times: int = MEASUREMENTS) -> Any:
    """The figures of so many steps of 2 s; rank 3 waits `data` seconds for data."""
    figures = [figure for rank, seconds in enumerate(compute) for figure in (seconds, data * (rank == 3), 2.0)]
    for _ in range(times):
        pace.judge(7, figures)
    return pace.slowest


def events_of(folder: Path) -> list[tuple[str, str | None]]:
    return [(event["event"], event.get("host")) for event in read_events(folder)[0]]


def test_a_rank_that_stays_slow_is_said_once_with_its_machine(
    pace: Pace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pace.judge(0, [])
    assert pace.slowest is None
    usual, slow = [1.0, 1.1, 1.05, 1.0], [1.0, 1.1, 1.8, 1.0]
    feed(pace, usual)
    feed(pace, slow, times=3)
    feed(pace, usual)
    assert events_of(tmp_path) == []  # a few slow steps are nothing
    slowest = feed(pace, slow, times=3 * MEASUREMENTS)
    assert slowest == {"slowest_rank": 2, "slowest_seconds": 1.8, "median_seconds": 1.05}
    assert events_of(tmp_path) == [("slow_rank", "b")]
    assert capsys.readouterr().out == "slow      rank 2 on b computes 1.80 times as long as the usual rank\n"
    feed(pace, [1.0, 1.1, 1.2, 1.0], times=2 * MEASUREMENTS)
    assert events_of(tmp_path) == [("slow_rank", "b")]  # around the limit nothing is said again and again
    feed(pace, usual)
    feed(pace, slow)
    assert events_of(tmp_path) == [("slow_rank", "b"), ("slow_rank_over", "b"), ("slow_rank", "b")]


def test_steps_that_wait_for_data_are_said_with_advice(
    pace: Pace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(pace, [1.0] * 4, data=0.3, times=2 * MEASUREMENTS)
    assert events_of(tmp_path) == []
    feed(pace, [1.0] * 4, data=0.6, times=2 * MEASUREMENTS)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("data      steps wait 30% of their time for data, longest on b (rank 3): put data.cache")
    feed(pace, [1.0] * 4)
    assert [name for name, _ in events_of(tmp_path)] == ["data_stall", "data_stall_over"]


def wait_for_each_other(late: int) -> tuple[float, bool]:
    """Two all-reduces, into which rank `late` comes later; the seconds in them, and whether torch is whole again."""
    whole = dict(vars(dist.ProcessGroup))
    waiting = Waiting(torch.device("cpu"))
    with waiting.measured():
        for _ in range(2):
            if dist.get_rank() == late:
                time.sleep(0.3)
            dist.all_reduce(torch.ones(1))
    return waiting.seconds(), whole == dict(vars(dist.ProcessGroup))


def test_who_comes_late_waits_least(world: World) -> None:
    (early, whole), (late, _) = world.run(wait_for_each_other, 1)
    assert early > 0.5 > late  # 0.6 s of sleep, in which rank 0 can only wait
    assert whole


class Stream:
    """A GPU's stream, whose clock goes where something works on it."""

    def __init__(self) -> None:
        self.now = 0.0


def test_on_a_gpu_a_collective_beside_the_computing_counts_what_is_waited_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computing, beside = Stream(), Stream()
    current = [computing]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Stream | None = None) -> None:
            self.time = (stream or current[0]).now

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.time - self.time)

    def work(seconds: float) -> None:
        current[0].now += seconds

    def synchronize() -> None:
        computing.now = beside.now = max(computing.now, beside.now)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(dist.ProcessGroup, "allreduce", work)
    waiting = Waiting(torch.device("cuda"))
    with waiting.measured():
        dist.ProcessGroup.allreduce(0.5)  # type: ignore[arg-type]
        current[0] = beside
        dist.ProcessGroup.allreduce(4.0)  # type: ignore[arg-type]
        current[0] = computing
        work(3.0)
        torch.cuda.synchronize()
    assert waiting.seconds() == pytest.approx(0.5 + 0.5)  # the second ends half a second after the computing
    assert torch.cuda.synchronize is synchronize


@pytest.mark.parametrize(("idle", "least", "most"), [(5.0, 0.5, 0.5), (0.0, 0.0, 0.2)])
def test_data_that_the_host_waits_for_while_the_device_works_costs_nothing(
    pace: Pace, idle: float, least: float, most: float
) -> None:
    before = Moment(torch.device("cpu"))
    before._seconds -= idle
    pace.waited_for_data(0.5)
    with pace.measured(4, before):
        pass
    _, data, _ = pace.row(4 + DELAY)[: Pace.FIGURES]
    assert least <= data / pace._topology.tensor <= most


def train_with_a_slow_rank(rank: int, **arguments: Any) -> None:
    """Train; one rank takes long over each step."""
    from moe_mamba.model.language_model import LanguageModel

    forward = LanguageModel.forward

    def slowly(model: LanguageModel, *rest: Any, **options: Any) -> Any:
        if model.training and dist.get_rank() == rank:
            time.sleep(0.15)
        return forward(model, *rest, **options)

    with pytest.MonkeyPatch.context() as patch, stepping_in("step"):
        patch.setattr(LanguageModel, "forward", slowly)
        train(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"parallel.tensor": 2},
        {"parallel.expert": 2, "parallel.zero": 2},
        {"parallel.zero": 3, "model.pattern": "M-"},
    ],
)
def test_a_slow_rank_of_a_run_is_found(world: World, tiny: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    run = {"run.folder": str(tmp_path / "run"), "train.steps": 2 * MEASUREMENTS, "train.sample_tokens": 0}
    world.run(train_with_a_slow_rank, 1, ranks=2, config=str(tiny), **run, **keys)
    slow = [event for event in read_events(tmp_path / "run")[0] if event["event"] == "slow_rank"]
    assert [event["rank"] for event in slow] == [1]
    pace = [line["pace"]["slowest_rank"] for line in read_metrics(tmp_path / "run") if "pace" in line]
    assert pace.count(1) > 0.8 * len(pace)
