"""Types that the configuration is written in: numbers in their ranges, and values as command lines spell them."""

import json
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _none_from_text(value: object) -> object:
    """Read ``null`` and ``none`` from a command line as no value."""
    return None if isinstance(value, str) and value.lower() in ("null", "none", "") else value


def _null_from_text(value: object) -> object:
    """Read ``null`` from a command line as no value, where ``none`` is one."""
    return None if isinstance(value, str) and value.lower() in ("null", "") else value


def _structure_from_text(value: object) -> object:
    """Read JSON lists and objects, and ``a,b``, from a command line."""
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"begins with {value[0]} but is not JSON ({error}): fix it, or write a,b") from None
    return [part for part in value.split(",") if part]


def _null_or_checked(value: object, check: ValidatorFunctionWrapHandler) -> object:
    value = _none_from_text(value)
    return None if value is None else check(value)


def _names_from_text(value: object) -> object:
    """As ``_structure_from_text``, where blanks around a name, ``none`` and ``null`` mean nothing."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        return []
    names = _structure_from_text(value)
    return [name.strip() if isinstance(name, str) else name for name in names] if isinstance(names, list) else names


# A type checker takes it for an int, which it is for all that builds a model: null stands only in what a user asks for,
# until a run resolves it (Config.with_vocabulary).
VocabularySize = Annotated[Positive, WrapValidator(_null_or_checked), PlainSerializer(lambda value: value)]
Text = Annotated[str, BeforeValidator(lambda value: value if value is None else str(value))]
OptionalPositive = Annotated[Positive | None, BeforeValidator(_none_from_text)]
OptionalFactor = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_from_text)]
OptionalBalance = Annotated[Literal["loss", "bias", "none"] | None, BeforeValidator(_null_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(_none_from_text)]
Projections = Annotated[list[Literal["conv", "gate", "out"]], BeforeValidator(_names_from_text)]
Numbers = Annotated[list[Positive], BeforeValidator(_structure_from_text)]
Sources = Annotated[dict[str, float] | dict[str, str] | list[str], BeforeValidator(_structure_from_text)]


class Section(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
