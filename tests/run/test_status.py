"""How a run stands, from a folder in any state."""

import json
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moe_mamba.commands.status import describe, main
from moe_mamba.config import LoggingConfig
from moe_mamba.errors import UserError
from moe_mamba.run.events import Events, read_events, why_ended
from moe_mamba.run.heartbeats import forget_machines, read_heartbeats, write_heartbeat
from moe_mamba.run.metrics import MetricsWriter, read_metrics
from moe_mamba.run.status import read_status

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat()


def write_run(folder: Path, *events: dict, beats: dict[str, float] | None = None, losses: int = 0) -> Path:
    """A run's folder: events with `t` seconds for their time, signs of life, and metrics of 10 s a step."""
    (folder / "heartbeats").mkdir(parents=True)
    lines = [json.dumps({"time": at(event.pop("t")), "step": 0} | event) for event in map(dict, events)]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for host, seconds in (beats or {}).items():
        (folder / "heartbeats" / host).write_text(json.dumps({"time": at(seconds), "step": losses, "process": 1}))
    figures = [
        {"step": n, "tokens": 100 * n, "loss": 5 - n / 100, "tokens_per_second": 10.0} for n in range(1, losses + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in figures))
    return folder


START = {"t": 0, "event": "start", "steps": 100, "machines": {"a": 1, "b": 1}, "processes": 2}


def said(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    main(str(run))
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 24
    return text


def test_a_run_that_works(tmp_path: Path) -> None:
    slow = [{"t": 50, "event": "slow_rank", "rank": rank, "host": "b", "times": 1.5} for rank in (1, 2)]
    over = {"t": 90, "event": "slow_rank_over", "rank": 2, "host": "b"}
    trouble = [{"t": 60, "event": "nan"}, {"t": 60, "event": "skip", "batches": [7]}, {"t": 70, "event": "spike"}]
    run = write_run(tmp_path / "run", START, *slow, *trouble, over, beats={"a": 395, "b": 390}, losses=30)
    status = read_status(run, BEGIN + timedelta(seconds=400))
    assert (status.state, status.step, status.steps) == ("runs", 30, 100)
    assert status.ages == {"a": 5, "b": 10}
    assert status.seconds_left == 700
    assert (status.nan, status.spikes, status.left_out, status.rewinds) == (1, 1, 1, 0)
    assert status.slow == [(1, "b", 1.5)]
    assert status.goodput == pytest.approx(300 / 400)
    assert status.loss == pytest.approx(4.7)
    assert status.trend is not None and status.trend[0] > status.trend[1]


def test_a_machine_that_is_silent_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", START, beats={"a": 395, "b": 200, "gone": 395}, losses=30)
    status = read_status(run, BEGIN + timedelta(seconds=400))
    assert (status.state, status.why) == ("silent", "b")


def test_a_run_that_was_killed_has_lost_what_was_not_saved(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", START, beats={"a": 395, "b": 390}, losses=30)
    for step, files in ((20, ["manifest.json"]), (25, [])):  # the second lacks what is written last
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        for file in files:
            (run / "checkpoints" / f"step-{step:08d}" / file).write_text("{}")
    status = read_status(run, BEGIN + timedelta(days=1))
    assert (status.state, status.seconds_left) == ("died", None)
    assert "without a word" in status.why
    assert status.goodput == pytest.approx(200 / 395)
    assert status.checkpoint is not None and status.checkpoint.name == "step-00000020"
    log = run / "log.txt"
    log.write_text("error: an old one\n" + "x\n" * 10)
    (run / "events.jsonl").write_text(json.dumps({"time": at(0), "event": "start", "step": 0, "log_bytes": 18}) + "\n")
    assert "without a word" in read_status(run, BEGIN + timedelta(days=1)).why
    with log.open("a") as stream:
        stream.write("error: rank 3 (b, process 7) died\n")
    assert read_status(run, BEGIN + timedelta(days=1)).why == "rank 3 (b, process 7) died"


def test_a_run_that_was_stopped_and_begins_again(tmp_path: Path) -> None:
    ends = [{"t": 100, "event": "stop", "step": 9, "reason": "stopped by SIGTERM"}]
    again = {"t": 200, "event": "restart", "step": 9, "reason": "stopped by SIGTERM", "machines": {"a": 1}}
    run = write_run(tmp_path / "run", START, *ends, beats={"a": 105}, losses=9)
    stopped = read_status(run, BEGIN + timedelta(seconds=150))
    assert (stopped.state, stopped.why, stopped.step) == ("stopped", "stopped by SIGTERM", 9)
    shutil.rmtree(run)
    run = write_run(tmp_path / "run", START, *ends, beats={"a": 150}, losses=9)
    assert read_status(run, BEGIN + timedelta(seconds=152)).state == "begins"
    shutil.rmtree(run)
    run = write_run(tmp_path / "run", START, *ends, again, beats={"a": 205}, losses=9)
    status = read_status(run, BEGIN + timedelta(seconds=210))
    assert (status.state, status.restarts) == ("runs", ["stopped by SIGTERM"])


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    write_heartbeat(tmp_path / "run", "a", 0)
    assert read_status(tmp_path / "run").state == "begins"
    assert "it begins" in said(tmp_path / "run", capsys)


def test_a_finished_run_is_told_whole(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(plain, capsys)
    for part in (": finished", "6 of 6 (100.0%)", "validation ", "step-00000006", "restarts    0", "0 NaN, 0 spikes"):
        assert part in text, part
    assert "% of the wall time" in text


def test_a_damaged_folder_is_told_as_far_as_it_goes(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    for name in ("events.jsonl", "metrics.jsonl"):
        (run / name).write_bytes(b'{"step": \x00\n' + (run / name).read_bytes()[:-5])
    (run / "heartbeats" / "a").write_text('{"time"')
    (run / "config.yaml").write_text("train: [")
    text = said(run, capsys)
    assert "2 lines of events.jsonl cannot be read" in text
    assert "lines of metrics.jsonl cannot be read" in text
    assert "6 of 6" in text  # as its start said


def test_what_is_no_run_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "is not a folder" in refusal(main, tmp_path / "nowhere")
    assert "is not a run's folder" in refusal(main, tmp_path)


# Events and signs of life


def test_events_are_lines_and_a_truncated_one_harms_no_other(tmp_path: Path) -> None:
    events = Events(tmp_path, enabled=True)
    events.write("start", 0, steps=5)
    with (tmp_path / "events.jsonl").open("ab") as stream:
        stream.write(b'{"time": "2026-')  # a kill, or a full disk
    events.write("nan", 3, loss=float("nan"))
    Events(tmp_path, enabled=False).write("stop", 4)
    found, damaged = read_events(tmp_path)
    assert [event["event"] for event in found] == ["start", "nan"]
    assert (found[1]["loss"], found[1]["step"], damaged) == ("nan", 3, 1)
    assert why_ended(found, tmp_path / "log.txt").startswith("it ended without a word")
    assert why_ended([], tmp_path / "log.txt") == "it ended before it began to train"


def test_an_event_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Events(tmp_path / "nowhere", enabled=True).write("start", 0)
    assert "could not be written" in caplog.text


def test_a_sign_of_life_lasts_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heartbeat(tmp_path, "a", 3)
    before = (tmp_path / "heartbeats" / "a").stat().st_mtime_ns

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_space)
        write_heartbeat(tmp_path, "a", 4)
    assert (tmp_path / "heartbeats" / "a").stat().st_mtime_ns > before
    write_heartbeat(tmp_path, "b", 4)
    assert {host: beat["step"] for host, beat in read_heartbeats(tmp_path).items()} == {"a": 3, "b": 4}
    forget_machines(tmp_path, {"b"})
    assert list(read_heartbeats(tmp_path)) == ["b"]


ODD = [
    *("null", "true", "-1", "1.5", "1e400", "NaN", "-Infinity", "9" * 30, "9" * 5000, '""', '"\\ud800"', '"\\u0000"'),
    *('"\\u001b[2Ja\\nb"', '"' + "x" * 5000 + '"', "[]", "{}", "[" * 20_000, '{"a":' * 500, "[1]", "[[[]]]", "1e-320"),
    *("1e308", "10e14", '"9999-12-31T23:59:59-23:59"', '"0001-01-01T00:00:00+23:59"', '"yesterday"'),
    '{"a": {"loss": "x"}}',
]
FILES = ("events.jsonl", "metrics.jsonl", "heartbeats/a")
FUZZED = 1000


def damage(chance: random.Random, text: str) -> bytes:
    """Some bytes changed, or the end missing, or a value of another type."""
    data, place, kind = text.encode(), chance.randrange(len(text)), chance.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + chance.randbytes(chance.randrange(4)) + data[place + 1 :]
    lines = [json.loads(line) for line in text.splitlines()]
    line = chance.choice(lines)
    line[chance.choice([*line, "machines", "batches", "rank", "times", "validation", "log_bytes"])] = "ODD"
    return "".join(f"{json.dumps(line)}\n" for line in lines).replace('"ODD"', chance.choice(ODD)).encode()


def test_damaged_files_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, noted = random.Random(0), 0
    slow = {"t": 50, "event": "slow_rank", "rank": 1, "host": "b", "times": 1.5}
    stall = {"t": 51, "event": "data_stall", "share": 0.5, "host": "b"}
    again = {"t": 99, "event": "restart", "steps": 100, "reason": "killed"}
    skip = {"t": 60, "event": "skip", "batches": [7]}
    run = write_run(tmp_path / "run", START, slow, stall, skip, again, slow, beats={"a": 395, "b": 390}, losses=60)
    whole = {name: (run / name).read_text() for name in FILES}
    for _ in range(FUZZED):
        name = chance.choice(FILES)
        (run / name).write_bytes(damage(chance, whole[name]))
        lines = describe("run", read_status(run, BEGIN + timedelta(seconds=chance.choice([0, 400, 10**9]))))
        noted += "damaged" in dict(lines)
        read_events(run)
        MetricsWriter(run, 60, LoggingConfig(), {}).close()
        (run / name).write_text(whole[name])
    main(str(run))
    assert capsys.readouterr().out.isascii(), f"after {FUZZED:,} damaged files"
    print(f"{FUZZED:,} damaged files, of which {noted:,} were noted")
    assert FUZZED // 3 < noted < FUZZED


def test_what_is_shown_is_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "a\x1b[2J\nb" + "x" * 1000
    run = write_run(tmp_path / "run", START, {"t": 9, "event": "stop", "reason": reason}, beats={"a": 1})
    text = said(run, capsys)
    assert "it does not run: a\\x1b[2J b" in text
    assert all(line.isprintable() and len(line) < 310 for line in text.splitlines())
    (run / "heartbeats" / "c").mkdir()
    (run / "heartbeats" / "d").write_bytes(b"[" * 100_000)
    forget_machines(run, {"a", "d"})
    assert "heartbeats/c cannot be read" in said(run, capsys)
    assert list(read_heartbeats(run)) == ["a"]


def test_a_damaged_line_of_metrics_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n\xff\n')
    MetricsWriter(tmp_path, 2, LoggingConfig(), {}).close()
    assert path.read_bytes().endswith(b'\n{"step": "2"}\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a line of metrics: remove it"):
        read_metrics(tmp_path)
