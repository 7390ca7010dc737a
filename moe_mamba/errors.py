"""The errors that are one line to the user: what is wrong, where, and how to fix it."""

import reprlib


def shown(value: object, most: int = 60) -> str:
    """What a file or a user gave, for a line of at most `most` characters: text as it is, all else as Python has it.

    Line ends, control characters and lone surrogates are written as escapes, and the middle of what is long is left
    out.
    """
    text = value if isinstance(value, str) else _short.repr(value) if not isinstance(value, Exception) else str(value)
    text = text if len(text) <= 4 * most else text[: 2 * most] + text[-2 * most :]
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[len(text) - (most - 3 - half) :]}"


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 400


class UserError(Exception):
    """Bad input. The command line prints it as one line on standard error and exits with code 2."""


class LocalError(UserError):
    """The fault of one process or its machine, which rank 0 may not see: printed whatever the rank."""


class RunStopped(Exception):
    """A run that cannot go on, such as one whose loss is NaN or Inf: one line, and an exit code.

    Args:
        message: the line.
        code: the exit code.
        said: the line is on the screen already.
    """

    def __init__(self, message: str, *, code: int = 1, said: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.said = said
