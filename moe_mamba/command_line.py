"""How every command of the project starts: a Fire function, and one line and exit code 2 for the user's mistakes."""

import contextlib
import errno
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import fire
from fire.core import FireExit
from pydantic import ConfigDict, ValidationError, validate_call

from moe_mamba.config_types import allowed
from moe_mamba.errors import LocalError, RunStopped, UserError, shown
from moe_mamba.parallel.launcher import is_first_process
from moe_mamba.standard_streams import standard_streams

SCARCE = {
    errno.EMFILE: "allow more open files (ulimit -n 4096)",
    errno.ENFILE: "let other programs of this machine close files",
    errno.ENOMEM: "free memory, or allow more (ulimit -v)",
    errno.ENOSPC: "free the disk",
    errno.EDQUOT: "free the disk, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f unlimited)",
}
"""What a machine may not have enough of -> the fix, where an error does not say for what."""


def run_command(function: Callable[..., None]) -> None:
    """Run `function` with the flags of the command line; its signature is the flags, its docstring the help.

    Values are read as the types that the signature names; text stays as it was typed. Exits with 2, and one line on
    standard error, where the user's input is wrong, with 1 where a run could not go on, and with 141 where nobody reads
    what is printed any more. The line is rank 0's, or of the rank that alone can see what is wrong.
    """
    run_to_one_line(lambda: parse(function)())


def run_to_one_line(call: Callable[[], None]) -> None:
    """Run a command, whose errors are one line and an exit code; see ``run_command``."""
    with standard_streams():
        try:
            call()
            sys.stdout.flush()
        except ValidationError as error:
            _end(UserError(_wrong_value(error)), 2)
        except UserError as error:
            _end(error, 2)
        except RunStopped as error:
            _end(error, error.code)
        except UnicodeEncodeError as error:
            if (encoding := sys.getfilesystemencoding()) == "utf-8":
                raise
            _end(LocalError(f"{shown(error.object)}: this locale's encoding is {encoding}: set PYTHONUTF8=1"), 2)
        except OSError as error:
            if error.filename is None:
                if error.errno not in SCARCE:
                    raise
                _end(LocalError(f"{error.strerror}: {SCARCE[error.errno]}, and give the same command again"), 2)
            path = os.fsdecode(error.filename)
            _end(LocalError(f"{path}: {error.strerror}: correct this, or give another path"), 2)
        except KeyboardInterrupt:
            sys.exit(130)


def _end(error: UserError | RunStopped, code: int) -> NoReturn:
    """Say the error where this process is to say it, and exit."""
    is_said = isinstance(error, RunStopped) and error.said
    if not is_said and (isinstance(error, LocalError) or is_first_process(os.environ)):
        print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def parse(function: Callable[..., None]) -> Callable[[], None]:
    """Let Fire read the command line, and give the call that it asks for, not yet made."""
    typed = validate_call(config=ConfigDict(coerce_numbers_to_str=True))(function)
    arguments = ["--help" if argument == "-h" else argument for argument in sys.argv[1:]]
    _check_arguments(arguments)
    if "--help" in arguments and "help" not in inspect.signature(function).parameters:
        arguments = ["--", "--help"]  # among flags of any name it would be one of them

    @functools.wraps(function)
    def bind(*arguments: Any, **flags: Any) -> None:
        parameters = inspect.signature(function).parameters
        if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters.values()):
            calls.append(functools.partial(typed, *arguments, **flags))
            return
        # Fire gives flags by position where it can; by name, a refusal can say which one is wrong.
        named = dict(zip(parameters, arguments, strict=False))
        _check_given(function, named | flags)
        calls.append(functools.partial(typed, **named, **flags))

    bind.__signature__ = _shown_signature(function)  # type: ignore[attr-defined]
    calls: list[Callable[[], None]] = []
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            fire.Fire(bind, command=[_literal(argument) for argument in arguments])
    except FireExit as stop:
        if stop.code == 0:
            print(complaint.getvalue(), end="", flush=True)
            sys.exit(0)
        raise UserError(_first_line(complaint.getvalue())) from None
    return calls[-1]


def _shown_signature(function: Callable[..., None]) -> inspect.Signature:
    """The signature with types as the help is to name them: without limits, and Fire itself says Optional."""
    kinds, signature = get_type_hints(function), inspect.signature(function)

    def plain(name: str) -> Any:
        kind = kinds.get(name, inspect.Parameter.empty)
        rest = [one for one in get_args(kind) if one is not type(None)]
        return rest[0] if get_origin(kind) in (Union, UnionType) and len(rest) == 1 else kind

    return signature.replace(
        parameters=[one.replace(annotation=plain(name)) for name, one in signature.parameters.items()]
    )


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what could not be read as it is meant: bytes that are no text, and a flag with two values."""
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument):
            raise UserError(f"{shown(argument)} is not UTF-8 text here: type it in UTF-8, or set PYTHONUTF8=1")
        if argument == "--":  # after it Fire takes orders of its own
            raise UserError("-- alone is no flag: leave it out; --help lists the flags")
    given: dict[str, str] = {}
    for flag, name, value in _flags(arguments):
        if given.setdefault(name, value) != value:
            raise UserError(
                f"{shown(flag)[1:-1]} is given twice, as {shown(given[name])} and {shown(value)}: give it once"
            )


def _check_given(function: Callable[..., None], flags: Mapping[str, Any]) -> None:
    """Refuse a flag without a value that needs one: to an optional number it would be null, as if it were not there."""
    kinds = get_type_hints(function)
    for name, value in flags.items():
        if value == "" and name in kinds and str not in (kinds[name], *get_args(kinds[name])):
            raise UserError(f"--{name}=: give a value; --help lists the flags")


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Flags as they are typed, their names, and their values, which may be the argument behind them, as Fire does."""
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag.lstrip("-").replace("-", "_")
        if equals:
            yield flag, name, value
        elif not _is_flag(following):
            yield flag, name, following
        else:
            is_no = name.startswith("no")
            yield flag, name.removeprefix("no"), "False" if is_no else "True"


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") or re.fullmatch(r"-[A-Za-z]", argument) is not None


def _literal(argument: str) -> str:
    """Quote a value, of which Fire would make a number, a tuple, a name or an operator."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if (flag and not equals) or (not flag and _is_flag(value)):
        return argument
    return f"{flag}{equals}{value!r}"


def _wrong_value(error: ValidationError) -> str:
    first = error.errors()[0]
    value = shown(first["input"])
    typed = value[1:-1] if isinstance(first["input"], str) else value
    return f"--{first['loc'][0]}={typed}: {allowed(first)}; --help lists the flags"


def _first_line(complaint: str) -> str:
    lines = [line for line in complaint.splitlines() if line.startswith("ERROR:")]
    if not lines:
        return "the command line could not be parsed; --help lists the flags"
    return f"{lines[0].removeprefix('ERROR: ')}; --help lists the flags"
