"""JSON that comes from outside, or that a disk may have damaged: read within limits, and checked against types.

Nothing that a file says is believed before `check` has compared it with a type, of whole numbers in bounds, text and
lists of them (`Size`, pydantic's models in strict mode): no `true` for 1, no "16" for 16, no numbers past 64 bits.
"""

import json
import math
import stat
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moe_mamba.errors import UserError, brief

LIMIT = 64 * 2**20  # bytes of a file: in memory it may take twenty times as much
DEPTH = 32  # containers inside one another
LARGEST = 2**60  # the largest size, number of bytes or number of elements that is believed: sums stay below 2^63

Size = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Number = Annotated[float, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Value = TypeVar("Value")


class Record(BaseModel):
    """An object of such a file; keys that it does not name are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


def read_json(
    path: Path, fix: str, error: type[UserError] = UserError, allow_nan: bool = False, limit: int = LIMIT
) -> Any:
    """The content of a JSON file, in UTF-8 with or without a byte order mark.

    Args:
        path: the file; symbolic links are followed.
        fix: what the user can do, the end of the line.
        error: what is raised.
        allow_nan: take NaN and Infinity, which Python writes and JSON lacks; else they are refused.
        limit: bytes.

    Raises:
        UserError: as `error`: the file is missing, no regular file, too large, not readable, or not JSON; it has NaN, a
            key twice in one object, a number of thousands of digits, or is too deep.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a FIFO waits for ever
            raise error(f"{path} is not a regular file: {fix}")
        if status.st_size > limit:
            raise error(f"{path} has {status.st_size:,} bytes, more than the {limit:,} that are read: {fix}")
        return parse_json(path.read_bytes(), allow_nan)
    except FileNotFoundError:
        raise error(f"{path} is missing: {fix}") from None
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else fault
        raise error(f"{path} cannot be read as JSON ({brief(reason, 100)}): {fix}") from None


def parse_json(data: bytes, allow_nan: bool = False) -> Any:
    """The value that JSON text in UTF-8 stands for.

    Raises:
        ValueError: it is not JSON, or one of what `read_json` refuses.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it has {constant}, which is no number of JSON")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text[:20])

    options: dict[str, Any] = {} if allow_nan else {"parse_constant": refuse, "parse_float": number}
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, **options)
    except RecursionError:
        raise ValueError("it is too deep") from None
    if _is_deeper(content, DEPTH):
        raise ValueError("it is too deep")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values, nobody can say which one is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {brief(twice, 40)} is there twice")
    return found


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        containers = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [child for container in containers for child in container if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def check(value: Any, kind: TypeAdapter[Value], where: object, fix: str, error: type[UserError] = UserError) -> Value:
    """`value` as `kind`, whose models are strict.

    Args:
        value: from `read_json`.
        kind: the type.
        where: the file, for the line.
        fix: the end of the line.
        error: what is raised.

    Raises:
        UserError: as `error`: names the first place that is of another type or out of bounds.
    """
    try:
        return kind.validate_python(value)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        message = brief(first["msg"].removeprefix("Value error, "), 100)
        if first["type"] != "value_error":  # such a line says all by itself
            place = brief(".".join(map(str, first["loc"])), 60)
            found = "" if first["type"] == "missing" else f" is {brief(first['input'], 40)}"
            message = f"{place or 'it'}{found}: {message[:1].lower()}{message[1:]}"
        raise error(f"{where}: {message}: {fix}") from None
