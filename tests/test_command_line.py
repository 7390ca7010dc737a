import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from moe_mamba.command_line import run_command
from moe_mamba.config_types import Range
from moe_mamba.errors import RunStopped, UserError
from tests import ROOT

calls: list[tuple] = []


def command(checkpoint: str, prompt: str = "a", count: int = 3, json: bool = False, **overrides: object) -> None:
    """Do a thing.

    Args:
        checkpoint: where it lies.
        prompt: some text.
        count: how often.
        json: print JSON.
        overrides: any key.
    """
    if prompt == "bad":
        raise UserError("the prompt is bad: give another")
    if prompt == "stop":
        raise RunStopped("it went wrong at step 3")
    if prompt == "missing":
        Path("/nowhere/at all").read_text()
    calls.append((checkpoint, prompt, count, json, overrides))


def starving(number: int) -> None:
    """Want more than the machine has."""
    raise OSError(number, os.strerror(number))


def strict(checkpoint: str) -> None:
    """Take only one flag."""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, function=command) -> None:
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
    run_command(function)


@pytest.mark.parametrize("text", ["1, 2 (a)", "(ME)", "{a", "*-", "a=b", "x-", "None", "--"])
def test_text_reaches_the_command_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    run(monkeypatch, "--checkpoint=x", f"--prompt={text}", "--json", "--count", "-5", f"--model.pattern={text}")
    assert calls == [("x", text, -5, True, {"model.pattern": text})]


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "EFBIG"])
def test_what_a_machine_lacks_is_one_line_also_where_no_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = getattr(errno, name)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"--number={number}", function=starving)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"error: {os.strerror(number)}: ") and line.count("\n") == 1


def test_separate_values_are_text_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--checkpoint", "x", "--prompt", "Hello, world (1)", "--nojson")
    assert calls == [("x", "Hello, world (1)", 3, False, {})]


@pytest.mark.parametrize(
    ("arguments", "function", "code", "line"),
    [
        (["--checkpoint=x", "--prompt=bad"], command, 2, "error: the prompt is bad: give another\n"),
        (["--checkpoint=x", "--prompt=stop"], command, 1, "error: it went wrong at step 3\n"),
        (
            ["--checkpoint=x", "--prompt=missing"],
            command,
            2,
            "error: /nowhere/at all: No such file or directory: correct this, or give another path\n",
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, capsys, arguments, function, code, line) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments, function=function)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("arguments", [[], ["--checkpoint=x", "--unknown=3"]])
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments, function=strict)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "--help" in error


def test_only_the_first_rank_speaks(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--checkpoint=x", "--prompt=bad")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def test_help_is_the_docstring(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help", function=strict)
    assert stop.value.code == 0
    assert "Take only one flag" in capsys.readouterr().out


def test_help_names_the_types_that_a_flag_takes(monkeypatch, capsys) -> None:
    def limited(
        *,
        at_once: Annotated[int | None, Range(1, 9)] = None,
        seeds: Annotated[int, Range(1, 9)] = 1,
        only: str | None = None,
        kind: Literal["a", "b"] | None = None,
        names: list[str] | None = None,
    ) -> None:
        """Take numbers within limits."""

    with pytest.raises(SystemExit):
        run(monkeypatch, "--help", function=limited)
    types = re.findall(r"Type: (.*)", capsys.readouterr().out)
    assert types == ["Optional[int]", "int", "Optional[str]", "Optional[Literal]", "Optional[list]"]


def test_an_unknown_command_is_one_line_and_exit_code_2() -> None:
    line = [sys.executable, "-m", "moe_mamba", "trian"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: moe-mamba has no command 'trian': choose among train, ")
    assert done.stderr.count("\n") == 1
