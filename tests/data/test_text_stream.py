"""Text as it comes: whole characters, and nothing of a stop string."""

import pytest

from moe_mamba.data.text_stream import TextStream
from moe_mamba.data.tokenizer import BytesTokenizer


def streamed(text: str | bytes, *stops: str, prompt: str = "") -> tuple[list[str], bool]:
    """The parts that the bytes of ``text`` come in, and whether a stop string ended it."""
    tokenizer = BytesTokenizer()
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stops)
    parts = []
    for token in text if isinstance(text, bytes) else tokenizer.encode(text):
        parts.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*parts, stream.end()], stream.is_stopped


def test_characters_come_when_they_are_whole() -> None:
    assert streamed("aé€", prompt="ü") == (["a", "", "é", "", "", "€", ""], False)
    assert streamed("é".encode()[:1]) == (["", "\N{REPLACEMENT CHARACTER}"], False)  # half of one, at the end
    long = "ab é" * 30
    assert "".join(streamed(long, prompt=long)[0]) == long


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        ("one END two", ("END",), "one ", True),
        ("one EN two", ("END",), "one EN two", False),
        ("one EEND", ("END",), "one E", True),
        ("one EN", ("END",), "one EN", False),  # held back to the end
        ("aab", ("aab", "b"), "", True),
        ("aaab", ("aab",), "a", True),
        ("abcabd", ("abd",), "abc", True),
        ("xéy", ("é",), "x", True),
        ("END", ("END",), "", True),
        ("ab", ("abc", "b"), "a", True),
    ],
)
def test_a_stop_string_and_what_looks_like_one(text: str, stops: tuple[str, ...], shown: str, stopped: bool) -> None:
    parts, is_stopped = streamed(text, *stops)
    assert ("".join(parts), is_stopped) == (shown, stopped)


def test_a_false_alarm_is_shown_as_soon_as_it_is_one() -> None:
    assert streamed("aENd", "END")[0] == ["a", "", "", "ENd", ""]


def test_a_stop_string_in_the_prompt_ends_nothing() -> None:
    assert streamed("D a", "END", prompt="EN") == (["D", " ", "a", ""], False)


def test_a_stop_string_after_half_a_character() -> None:
    parts, stopped = streamed(b"\xc3END", "END")
    assert stopped and "".join(parts) == "\N{REPLACEMENT CHARACTER}"
