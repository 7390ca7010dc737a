"""What a run prints where nothing can be drawn over: whole lines."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

from tests import ROOT

SHOW = """
import sys
from pathlib import Path
from moe_mamba.run.console import Screen
with Screen(Path(sys.argv[1])) as screen:
    screen.say("header")
    screen.start_bar(0, 3)
    screen.advance(2.5, 100.0)
    screen.shout("error: something happened")
    if sys.argv[2] == "whole":
        screen.advance(2.0, 100.0)
        screen.advance(1.5, 100.0, tflops=412.34, mfu=0.4169)
        screen.stop_bar()
"""


def shown(tmp_path: Path, how: str) -> list[str]:
    command = [sys.executable, "-c", SHOW, str(tmp_path / "log.txt"), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert "\r" not in done.stdout
    return done.stdout.splitlines()


def test_an_error_begins_a_line_and_is_the_last_one_of_a_run_that_ends_with_it(tmp_path: Path) -> None:
    lines = shown(tmp_path, "broken")
    assert lines[0] == "header"
    assert lines[-1] == "error: something happened"
    assert "0/3" in lines[1]


def test_the_bar_of_a_whole_run_ends_full(tmp_path: Path) -> None:
    assert "3/3  loss 1.500  100 tokens/s  412 TFLOP/s (42% MFU)" in shown(tmp_path, "whole")[-1]


def test_a_terminal_has_one_bar_that_is_drawn_over(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", SHOW, str(tmp_path / "log.txt"), "whole"]
    subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\rerror: something happened\r\n" in said
    assert "3/3  loss 1.500" in said.rpartition("\r\n")[0].rpartition("\r")[2]
