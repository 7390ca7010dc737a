"""How every command of the project starts: a Fire function, and one line and exit code 2 for the user's mistakes."""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import fire
from fire.core import FireExit
from pydantic import ConfigDict, ValidationError, validate_call

from moe_mamba.errors import LocalError, RunStopped, UserError
from moe_mamba.parallel.launcher import is_first_process


def run_command(function: Callable[..., None]) -> None:
    """Run `function` with the flags of the command line; its signature is the flags, its docstring the help.

    Values are read as the types that the signature names; text stays as it was typed. Exits with 2, and one line on
    standard error, where the user's input is wrong, and with 1 where a run could not go on. The line is rank 0's, or
    of the rank that alone can see what is wrong.
    """
    try:
        _parse(function)()
    except ValidationError as error:
        if is_first_process(os.environ):
            print(f"error: {_wrong_value(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if isinstance(error, LocalError) or is_first_process(os.environ):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        if is_first_process(os.environ) and not error.said:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(function: Callable[..., None]) -> Callable[[], None]:
    """Let Fire read the command line, and give the call that it asks for, not yet made."""
    typed = validate_call(config=ConfigDict(coerce_numbers_to_str=True))(function)

    @functools.wraps(function)
    def bind(*arguments: Any, **flags: Any) -> None:
        # Fire gives flags by position where it can; by name, a refusal can say which one is wrong.
        named = dict(zip(inspect.signature(function).parameters, arguments, strict=False))
        calls.append(functools.partial(typed, **named, **flags))

    calls: list[Callable[[], None]] = []
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            fire.Fire(bind, command=[_literal(argument) for argument in sys.argv[1:]])
    except FireExit as stop:
        if stop.code == 0:
            print(complaint.getvalue(), end="")
            sys.exit(0)
        raise UserError(_first_line(complaint.getvalue())) from None
    return calls[-1]


def _literal(argument: str) -> str:
    """Quote a value, of which Fire would make a number, a tuple, a name or an operator."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if (flag and not equals) or re.fullmatch(r"-[A-Za-z]|True|False", value):
        return argument
    return f"{flag}{equals}{value!r}"


def _wrong_value(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"--{first['loc'][0]}={first['input']}: {first['msg'].lower()}; --help lists the flags"


def _first_line(complaint: str) -> str:
    lines = [line for line in complaint.splitlines() if line.startswith("ERROR:")]
    if not lines:
        return "the command line could not be parsed; --help lists the flags"
    return f"{lines[0].removeprefix('ERROR: ')}; --help lists the flags"
