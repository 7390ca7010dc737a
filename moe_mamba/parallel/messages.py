"""What processes tell each other in JSON, over a store or a socket, checked before it is believed."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from moe_mamba.errors import one_line

Text = Annotated[str, AfterValidator(one_line)]  # for people: no line breaks, no control characters, not long
M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """What is sent or received: the types as they stand, no more keys than these."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def parse(kind: type[M], text: bytes) -> M | None:
    """The message in a text; None where it holds none of this kind."""
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        return None
