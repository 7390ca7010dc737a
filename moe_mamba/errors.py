"""The errors that are one line to the user: what is wrong, where, and how to fix it."""

import reprlib

LONGEST = 290  # characters of a line; with "error: " before it, it stays within 300
LONGEST_WORD = 64  # of a line that is too long: a folder's name, a pattern, a key
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxlong = _VALUES.maxother = 60
_VALUES.maxdict = _VALUES.maxlist = _VALUES.maxtuple = _VALUES.maxset = 3
_VALUES.maxlevel = 2


def shown(value: object) -> str:
    """Any value as a few characters of a line: as Python writes it, escaped and cut short."""
    try:
        return _VALUES.repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"


def brief(value: object, most: int = 60) -> str:
    """Words of a file, a library or a user, for a part of a line: escaped where it must be, cut in its middle."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else value
    text = text if isinstance(text, str) else shown(text)
    text = text if len(text) <= 4 * most else f"{text[: 2 * most]}{text[-2 * most :]}"
    return _cut("".join(character if character.isprintable() else _escape(character) for character in text), most)


def one_line(text: str) -> str:
    """The text without line breaks and control characters, cut in its longest words, then in the middle, if too long.

    Its beginning says what is wrong, its end how to fix it; both stay.
    """
    if len(text) > 100 * LONGEST:
        text = f"{text[: 50 * LONGEST]}...{text[-50 * LONGEST :]}"
    line = " ".join("".join(map(_escaped, text)).split())
    if len(line) > LONGEST:
        line = " ".join(_cut(word, LONGEST_WORD) for word in line.split(" "))
    return _cut(line, LONGEST)


def _escaped(character: str) -> str:
    return character if character.isprintable() or character.isspace() else _escape(character)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


class UserError(Exception):
    """Bad input. The command line prints it as one line on standard error and exits with code 2.

    What is no one line of at most 290 characters is printed as one.
    """

    def __str__(self) -> str:  # not in __init__, which torch.compile could not trace
        return one_line(super().__str__())


class LocalError(UserError):
    """The fault of one process or its machine, which rank 0 may not see: printed whatever the rank."""


class RunStopped(Exception):
    """A run that cannot go on, such as one whose loss is NaN or Inf: one line, and an exit code.

    Args:
        message: the line; what is no one line of at most 290 characters is made one.
        code: the exit code.
        said: the line is on the screen already.
    """

    def __init__(self, message: str, *, code: int = 1, said: bool = False) -> None:
        super().__init__(one_line(message))
        self.code = code
        self.said = said
