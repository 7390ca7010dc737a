"""Odd command lines, in this process for every flag of every command, and through real commands; seeded and bounded."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path

import pytest

from moe_mamba.__main__ import COMMANDS
from moe_mamba.command_line import run_command
from moe_mamba.config_file import load_config
from tests import ROOT

FLAGS = Parameter.VAR_KEYWORD
TOOLS = ["assemble_hf", "benchmark", "build_kernels", "compare_runs", "compile_kernels"]
VALUES = [
    *("", " ", "null", "nan", "-inf", "1e999", "-1", "0", "1e9", "1e30", "010", "0x10", "True", "None", "(1,2)", "[1"),
    *("9" * 5000, "x" * 100_000, "a\nb", "\udcff", "a\0b", "'", "--", "-h", "lambda: 1", "é", "%s", "1_0", "\x1b[31m"),
]
ODD_LINES = [
    *(["--"], ["-"], ["-x"], ["---"], ["--=1"], ["--=", "="], ["--.=1"], ["--a.b.c.d=1"], ["--" + "a." * 5000 + "b=1"]),
    *(["--", "--interactive"], ["--", "--trace"], ["--", "--completion"], ["--a=1", "--a=2"], ["--a-b=1", "--a_b=2"]),
    *(["--train.steps.x=3"], ["--train.=3"], ["--..=3"], ["--'=1"], ["--é=1"], ["--a b=1"], ["stray"], ["--x", "--y"]),
    *(
        ["--" + "x" * 100_000 + "=1"],
        ["x" * 100_000],
        ["--train=1"],
        ["--train={}"],
        ["--config="],
        ["--config", "--a"],
    ),
]


def commands() -> dict[str, Callable[..., None]]:
    """Every command, with a body that does nothing: only what reads its flags is tried."""
    sys.path.insert(0, str(ROOT / "tools"))
    modules = [f"moe_mamba.commands.{name}" for name in COMMANDS] + TOOLS
    mains = {name: import_module(name).main for name in modules}
    return {name: functools.wraps(main)(lambda *arguments, **flags: None) for name, main in mains.items()}


def ends_well(
    function: Callable[..., None],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> bool:
    """Whether the flags were taken; where not, that one line says why."""
    monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
    code = 0
    try:
        run_command(function)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    what = [argument[:80] for argument in arguments]
    assert code in (0, 2), what
    assert error.count("\n") == (code == 2) and len(error) <= 301, (what, error)
    assert not error or (error.startswith("error: ") and error[:-1].isprintable()), (what, error)
    return code == 0


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flag_with_every_odd_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stride: int
) -> None:
    tried = taken = 0
    for main in commands().values():
        flags = signature(main).parameters
        needed = [f"--{name}=3" for name, flag in flags.items() if flag.default is flag.empty and flag.kind != FLAGS]
        for name in flags:
            others = [one for one in needed if not one.startswith(f"--{name}=")]
            for arguments in (
                [f"--{name}"],
                *([f"--{name}={value}"] for value in VALUES[len(name) % stride :: stride]),
            ):
                tried += 1
                taken += ends_well(main, [*others, *arguments], monkeypatch, capsys)
    print(f"{tried} flags with odd values, {taken} taken")
    assert 0 < taken < tried and tried > 2000 // stride, (tried, taken)


def test_odd_command_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mains = commands()
    tried = 0
    for name in ("moe_mamba.commands.train", "moe_mamba.commands.generate", "moe_mamba.commands.status"):
        for arguments in ODD_LINES:
            ends_well(mains[name], arguments, monkeypatch, capsys)
            tried += 1
    print(f"{tried} odd command lines")


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--temperature=nan", "give a number from 0 to"),
        ("--temperature=inf", "give a number from 0 to"),
        ("--top_p=2", "give a number from 0 to 1"),
        ("--top_k", "a flag without its value?"),
        ("--top_k=0", "give an integer from 1 to"),
        ("--seed=18446744073709551616", "give an integer from 0 to 9,223,372,036,854,775,807"),
        ("--seed=-1", "give an integer from 0 to"),
        ("--batch=1.5", "give an integer from 1 to"),
    ],
)
def test_what_a_text_is_drawn_with_is_in_range(refusal: Callable[..., str], flag: str, named: str) -> None:
    line = refusal(import_module("moe_mamba.commands.generate").main, "--checkpoint=x", "--prompt=a", flag)
    assert flag.partition("=")[0] in line and named in line


def test_a_flag_with_two_values_is_refused_and_with_one_twice_is_not(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = import_module("moe_mamba.commands.plan").main
    assert "--train.steps is given twice, as '5' and '6'" in refusal(plan, "--train.steps=5", "--train.steps=6")
    assert "is given twice" in refusal(plan, "--run-folder=a", "--run_folder=b")
    assert "--train.steps is given twice, as '5' and '6'" in refusal(plan, "--train.steps", "5", "--train.steps", "6")
    assert "is given twice, as 'a' and 'b'" in refusal(plan, "--config=a", "---config", "b")
    assert "is given twice, as 'True' and 'False'" in refusal(plan, "--json", "--nojson")
    assert ends_well(commands()["moe_mamba.commands.plan"], ["--json", "--json"], monkeypatch, capsys)


FILES = {
    "empty.yaml": b"",
    "marked.yaml": "\ufefftrain:\n  steps: 3\n".encode(),
    "utf16.yaml": "train:\n  steps: 3\n".encode("utf-16"),
    "bytes.yaml": b"run:\n  folder: \xff\n",
    "twice.yaml": b"train:\n  steps: 3\n  steps: 4\n",
    "documents.yaml": b"train: {}\n---\ntrain: {}\n",
    "alias.yaml": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "tag.yaml": b"run: !!python/object/apply:os.system ['true']\n",
    "deep.yaml": b"[" * 100_000,
    "large.yaml": b"x: 1\n" * 100_000,
    "tab.yaml": b"train:\n\tsteps: 3\n",
    "list.yaml": b"- train\n",
    "inf.yaml": b"train: {learning_rate: .inf}\n",
}
READ = ("empty.yaml", "marked.yaml", "inf.yaml")  # what is in the last is refused, not the file
# arguments, the environment, and what the line names
REAL: list[tuple[list[str], dict[str, str], str]] = [
    *(([f"--config={{folder}}/{name}"], {}, name) for name in FILES if name not in READ),
    (["--config={folder}/inf.yaml"], {}, "train.learning_rate='.inf'"),
    (["--config={folder}"], {}, "Is a directory"),
    (["--config=/dev/zero"], {}, "no regular file"),
    (["--config={folder}/pipe"], {}, "no regular file"),
    (["--train.steps"], {}, "train.steps=True: a flag without its value?"),
    (["--model.d_model=1e9"], {}, "model.d_model='1e9': give an integer from 1 to 131,072"),
    (["--train.beta1=1"], {}, "train.beta1='1': give a number from 0 to below 1"),
    (["--train.gradient_clip=inf"], {}, "train.gradient_clip='inf'"),
    (["--run.folder=" + "x" * 100_000], {}, "run.folder='xxx"),
    (['--data.train={"a": Infinity}'], {}, "the weight of 'a' is inf"),
    (["--data.validation=a.b,a_b"], {}, "'a.b' and 'a_b' would both be called 'a_b'"),
    (["--train.tokens=" + "9" * 5000, "--train.steps=null"], {}, "train.tokens='999"),
    ([], {"RANK": "abc"}, "RANK=abc is not a whole number"),
    ([], {"RANK": "0", "WORLD_SIZE": "9" * 18}, "a world has 1 to"),
    ([], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "\u0663"}, "MASTER_PORT="),
    ([], {"MOE_MAMBA_STOPPED_CODE": "9" * 5000}, "MOE_MAMBA_STOPPED_CODE=999"),
]


def real(arguments: list[str], environment: dict[str, str], named: str, folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    flags = (argument.replace("{folder}", str(folder)) for argument in arguments)
    line = [sys.executable, str(ROOT / "launch" / "train.py"), *flags]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ") and len(said) <= 300 and named in said, said
    assert not (folder / "runs").exists(), "something was begun"


@pytest.mark.parametrize("name", ["empty.yaml", "marked.yaml"])
def test_a_file_may_be_empty_and_begin_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert load_config(tmp_path / name).train.steps == (3 if name == "marked.yaml" else 1000)


@pytest.mark.parametrize("place", range(0, len(REAL), 3))
def test_real_commands(tmp_path: Path, place: int) -> None:
    real(*REAL[place], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in range(len(REAL)) if place % 3])
def test_more_real_commands(tmp_path: Path, place: int) -> None:
    real(*REAL[place], tmp_path)
