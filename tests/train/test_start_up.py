import json
import time
from pathlib import Path

from moe_mamba.train.start_up import StartUp

PARTS = ["imports", "machines", "corpora", "groups", "kernels", "engine", "checkpoint", "first step"]


def test_parts_are_all_the_time_since_the_process_began() -> None:
    start_up = StartUp()
    start_up.reached("imports")
    time.sleep(0.1)
    start_up.reached("groups")
    start_up.reached("kernels")
    time.sleep(0.1)
    start_up.reached("groups")  # again
    assert list(start_up.seconds) == ["imports", "groups", "kernels"]
    assert start_up.seconds["kernels"] < 0.1 <= start_up.seconds["groups"] / 2 + 0.001
    total = sum(start_up.seconds.values())
    assert start_up.describe().startswith(f"{total:.1f} s to the end of the first step: imports ")
    assert "kernels" not in start_up.describe() or start_up.seconds["kernels"] >= 0.05


def test_a_run_notes_its_parts_once(plain: Path) -> None:
    events = [json.loads(line) for line in (plain / "events.jsonl").read_text().splitlines()]
    (noted,) = (event for event in events if event["event"] == "first_step")
    assert noted["step"] == 1
    assert list(noted["seconds"]) == PARTS
    assert min(noted["seconds"][part] for part in ("imports", "corpora", "engine", "first step")) > 0
    (said,) = (line for line in (plain / "log.txt").read_text().splitlines() if line.startswith("start  "))
    assert "s to the end of the first step: imports" in said
