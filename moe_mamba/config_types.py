"""Types that the configuration is written in: numbers in their ranges, and values as command lines spell them.

Files and command lines give text, other callers Python's values; both are read by the key's type, and only by it. What
is refused is refused with what is allowed instead; ``config_file.py`` puts the key before it.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    GetCoreSchemaHandler,
    PlainSerializer,
    WrapValidator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from moe_mamba.errors import shown

DEVICES = 131_072  # processes of the largest world that is believed
LONGEST_TEXT = 4096  # characters of a folder, a source, a pattern; Linux takes no longer path
LONGEST_NUMBER = 100  # characters
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # controls, line breaks, surrogates
NUMBER = re.compile(r"[+-]?(\d+(_\d+)*(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def refused(allowed: str) -> PydanticCustomError:
    """The error of a value that a key does not take; `allowed` says what it takes, as an order."""
    return PydanticCustomError("not_allowed", "{allowed}", {"allowed": allowed})


def allowed(error: ErrorDetails) -> str:
    """What a key or a flag takes, of pydantic's error about it, as an order."""
    if error["type"] in ("bool_parsing", "bool_type"):
        return "give true or false"
    if error["type"] == "literal_error":
        return f"give {error['ctx']['expected']}"
    if error["type"] == "string_type":
        return f"{_missing(error['input'])}give a text"
    return error["msg"] if error["type"] == "not_allowed" else error["msg"].lower()


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes: of an annotation ``int`` whole ones, of ``int | None`` also null.

    A bool is none, though Python counts with it: it is what a flag without a value gives, and what YAML calls true.

    Attributes:
        least: the smallest.
        most: the largest: beyond what anybody trains today, and below what breaks a format or an allocation.
        is_open: ``most`` itself is not allowed.
    """

    least: float
    most: float
    is_open: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read and check a value before pydantic sees it."""
        kinds = getattr(source, "__args__", (source,))
        read = self.read_whole if int in kinds else self.read
        if type(None) not in kinds:
            return core_schema.no_info_before_validator_function(read, handler(source))
        return core_schema.no_info_before_validator_function(_null_or(read), handler(source))

    def read(self, value: object) -> float:
        """The number that a value is or spells, in the range."""
        number = _number(value)
        if number is None or not self._holds(number):
            raise refused(f"{_missing(value)}give a number {self}")
        return float(number)

    def read_whole(self, value: object) -> int:
        """The whole number that a value is or spells, in the range; 1e9 and 2.0 are some."""
        number = _number(value)
        if number is None or not self._holds(number) or number != math.floor(number):
            raise refused(f"{_missing(value)}give an integer {self}")
        return int(number)

    def _holds(self, number: float) -> bool:
        return self.least <= number <= self.most and not (self.is_open and number == self.most)

    def __str__(self) -> str:
        to = "to below" if self.is_open else "to"
        return f"from {_written(self.least)} {to} {_written(self.most)}"


def _written(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _number(value: object) -> float | None:
    """The number that a value is, or that a text spells; None: neither."""
    if isinstance(value, int | float):
        return None if isinstance(value, bool) else value
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER or not NUMBER.fullmatch(text := value.strip()):
        return None
    text = text.replace("_", "")
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def whole_from_text(value: object) -> object:
    """Read a choice among whole numbers; what is none stays as it is, for the choice to refuse."""
    number = _number(value)
    if isinstance(value, bool):  # it would be taken for 0 or 1
        raise refused(f"{_missing(value)}give an integer")
    if number is None:
        return value
    return int(number) if abs(number) < DEVICES and number == int(number) else value


def _missing(value: object) -> str:
    """What to say first of True, as which a flag arrives that has no value."""
    return "a flag without its value? " if value is True else ""


def _null_or(read: Callable[[object], Any]) -> Callable[[object], Any]:
    def read_or_null(value: object) -> Any:
        value = _none_from_text(value)
        return None if value is None else read(value)

    return read_or_null


def _none_from_text(value: object) -> object:
    """Read ``null`` and ``none`` from a command line as no value."""
    return None if isinstance(value, str) and value.strip().lower() in ("null", "none", "") else value


def _null_from_text(value: object) -> object:
    """Read ``null`` from a command line as no value, where ``none`` is one."""
    return None if isinstance(value, str) and value.lower() in ("null", "") else value


def _text(value: object) -> str:
    """A text that a file can be called and every format can hold; a number is read as its digits."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) < value < 2**63:
        value = str(value)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise refused(f"{_missing(value)}give a text of at most {LONGEST_TEXT:,} characters")
    if UNWRITABLE.search(value):
        raise refused("give a text without line breaks, control characters and bytes that are not UTF-8")
    return value


def _filled_text(value: object) -> str:
    text = _text(value)
    if not text.strip():
        raise refused("give a name: it is empty")
    return text


def _path(value: object) -> str:
    """As ``_filled_text``, where ``~`` is the home folder: shells leave it alone behind ``=``, and YAML does."""
    return os.path.expanduser(_filled_text(value))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no key is lost."""
    _check_distinct([name for name, _ in pairs])
    return dict(pairs)


def _check_distinct(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise refused(f"{shown(name)} is named twice: name it once")
        seen.add(name)


def _structure_from_text(value: object) -> object:
    """Read JSON lists and objects, and ``a,b``, from a command line."""
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):
        try:
            return json.loads(value, object_pairs_hook=_distinct)
        except PydanticCustomError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
            raise refused(f"it begins with {value[0]} but is not JSON ({reason}): fix it, or write a,b") from None
    return [part for part in value.split(",") if part]


def _weights(value: object) -> object:
    """Sources to train on: their names, each once, or a mapping of each to its weight."""
    found = _structure_from_text(value)
    if isinstance(found, dict):
        read = Range(1e-9, 1e15).read
        weights = {}
        for source, weight in found.items():
            try:
                weights[_path(source)] = read(weight)
            except PydanticCustomError as error:
                raise refused(f"the weight of {shown(source)} is {shown(weight)}: {error}") from None
        return weights
    return _names(found, "sources, as a,b or as a mapping of each to its weight")


def _sets(value: object) -> object:
    """Sources to validate on: a list, or a mapping of a set's name to its source."""
    found = _structure_from_text(value)
    if isinstance(found, dict):
        return {_filled_text(name): _path(source) for name, source in found.items()}
    return _names(found, "sources, as a,b or as a mapping of a name to each")


def _names(found: object, what: str) -> list[str]:
    if not isinstance(found, list | tuple):
        raise refused(f"{_missing(found)}give {what}")
    names = [_path(name) for name in found]
    _check_distinct(names)
    return names


def _projections(value: object) -> object:
    """As a list of sources, where blanks around a name, ``none`` and ``null`` mean nothing."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        return []
    names = _structure_from_text(value)
    if not isinstance(names, list) or len(names) > 3:
        raise refused(f"{_missing(names)}give some of conv,gate,out, or none")
    return [name.strip() if isinstance(name, str) else name for name in names]


def _batches(value: object) -> object:
    found = _structure_from_text(value)
    if not isinstance(found, list | tuple):
        raise refused(f"{_missing(found)}give numbers of batches, such as 7,8")
    return found


Count = Range(1, 10**12)
Positive = Annotated[int, Count]
NonNegative = Annotated[int, Range(0, 10**12)]
OptionalPositive = Annotated[int | None, Count]
NonNegativeFloat = Annotated[float, Range(0, 1000)]
Fraction = Annotated[float, Range(0, 1)]
LocalRank = Annotated[int | None, Range(0, DEVICES)]  # as launchers give it to a command
Seed = Annotated[int, Range(0, 2**63 - 1)]
OptionalFactor = Annotated[float | None, Range(1e-6, 65_536)]
# A type checker takes it for an int, which it is for all that builds a model: null stands only in what a user asks for,
# until a run resolves it (Config.with_vocabulary).
VocabularySize = Annotated[
    Annotated[int, Range(1, 2**24)],
    WrapValidator(lambda value, check: _null_or(check)(value)),
    PlainSerializer(lambda value: value),
]
Text = Annotated[str, BeforeValidator(_text)]
FilledText = Annotated[str, BeforeValidator(_filled_text)]
PathText = Annotated[str, BeforeValidator(_path)]
OptionalPath = Annotated[str | None, BeforeValidator(_null_or(_path))]
OptionalText = Annotated[str | None, BeforeValidator(_null_or(_text))]
OptionalBalance = Annotated[Literal["loss", "bias", "none"] | None, BeforeValidator(_null_from_text)]
Projections = Annotated[list[Literal["conv", "gate", "out"]], BeforeValidator(_projections)]
Numbers = Annotated[list[Positive], FailFast(), BeforeValidator(_batches)]
TrainingSources = Annotated[dict[str, float] | list[str], BeforeValidator(_weights)]
ValidationSources = Annotated[dict[str, str] | list[str], BeforeValidator(_sets)]


class Section(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
