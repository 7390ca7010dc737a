"""Text as it comes: whole characters, and nothing of a stop string."""

import random
from collections.abc import Iterator, Sequence

import pytest

from moe_mamba.data.finality import CHARACTERS
from moe_mamba.data.library_calls import DecodingError
from moe_mamba.data.text_stream import TextStream
from moe_mamba.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, SymbolsTokenizer, Tokenizer
from tests.data.tokenizer_kinds import BYTES, KINDS


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


WRONG = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["", "the cat sat.", "  the  other ", "日本語 🙂 é", "a<s>b</s>", "hello \n\t lost", "▁the"]


def _rows(tokenizer: Tokenizer, draw: random.Random) -> Iterator[list[int]]:
    """Tokens of texts, tokens at random, runs of bytes, whole and broken characters, ids that no token has."""
    known = range(tokenizer.vocab_size)
    texts = ["3 1 12", ""] if isinstance(tokenizer, SymbolsTokenizer) else TEXTS
    yield from tokenizer.encode_batch(texts)
    for _ in range(12):
        yield draw.choices(known, k=draw.randint(1, 12))
    some = [tokenizer.end_of_text, *draw.choices(known, k=3), tokenizer.vocab_size + 3]
    if isinstance(tokenizer, SymbolsTokenizer):
        return
    byte = _bytes_of(tokenizer)
    for _ in range(30 * bool(byte)):
        row: list[int] = []
        for _ in range(draw.randint(1, 5)):
            content = draw.choice(
                ["日".encode(), b"\xff", b"\xe6\x97", b"a", b" ", "🙂".encode(), b"\xed\xa0\x80", b"\x80"]
            )
            row += [byte[value] for value in content] + draw.choices(some, k=draw.randint(0, 2))
        yield row


def _bytes_of(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte -> its token; empty: the tokenizer has none."""
    if isinstance(tokenizer, BytesTokenizer):
        return {byte: byte for byte in range(256)}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {byte: tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    vocabulary = tokenizer.library.get_vocab()
    names = {byte: name for name, byte in CHARACTERS.items()} if "Ġ" in vocabulary else dict(enumerate(BYTES))
    return {byte: vocabulary[name] for byte, name in names.items()} if names[0] in vocabulary else {}


def _decoded(tokenizer: Tokenizer, row: list[int]) -> str | None:
    """None: the library panics, as it does where it strips more spaces than a text has characters."""
    try:
        return tokenizer.decode(row)
    except DecodingError:
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_of_all_tokens_at_every_cut(kind: str) -> None:
    tokenizer, tried = KINDS[kind](), 0
    for row in _rows(tokenizer, random.Random(kind)):
        whole = _decoded(tokenizer, row)
        if whole is None:
            continue
        for cut in range(len(row) + 1):
            stream = TextStream(tokenizer, row[:cut])
            parts = [stream.beginning, *map(stream.push, row[cut:]), stream.end()]
            assert "".join(parts) == whole, (kind, row, cut, parts)
            assert _decoded(tokenizer, row[:cut]) in (None, stream.beginning + stream.rest), (kind, row, cut)
            tried += 1
    print(f"{kind}: {tried} cuts")
    assert tried > 50, f"{tried} cuts are too few"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_is_found_where_the_whole_text_has_it(kind: str) -> None:
    """Right before its first place behind the prompt, and as soon as decoding everything so far shows it."""
    tokenizer, draw, tried = KINDS[kind](), random.Random(kind), 0
    for row in _rows(tokenizer, draw):
        sofar = [_decoded(tokenizer, row[:count]) or "" for count in range(len(row) + 1)]
        whole = sofar[-1]
        if not whole or WRONG in whole:
            continue
        start = draw.randrange(len(whole))
        stop = whole[start : start + draw.randint(1, 4)]
        stream = TextStream(tokenizer, [], [stop])
        text = stream.beginning
        for count, token in enumerate(row, 1):
            text += stream.push(token)
            assert WRONG in sofar[count] or stream.is_stopped == (stop in sofar[count]), (kind, row, stop, count)
            if stream.is_stopped:
                break
        assert text == sofar[count][: sofar[count].find(stop)], (kind, row, stop)
        assert stream.end() == ""
        tried += 1
    assert tried >= 5, f"{tried} stops are too few"


def test_stop_strings_with_byte_fallback() -> None:
    tokenizer = KINDS["Llama"]()
    ids = tokenizer.encode("the 日本語 end 🙂 more")
    stream = TextStream(tokenizer, ids[:1], ["本"])
    text = stream.beginning
    count = 1
    while not stream.is_stopped:
        text += stream.push(ids[count])
        count += 1
    assert text == "the 日" and tokenizer.decode(ids[:count]).endswith("本")
    line = TextStream(tokenizer, tokenizer.encode("a"), ["\n"])
    assert line.push(3 + 0x0A) == "" and line.is_stopped, "a line's end is a byte token"
    prompt = tokenizer.encode("a本")
    stream = TextStream(tokenizer, prompt, ["本"])
    parts = [stream.push(token) for token in tokenizer.encode("語a")[1:]]
    assert stream.beginning + "".join(parts) + stream.end() == "a本語a" and not stream.is_stopped


@pytest.mark.parametrize("kind", ["Llama", "byte level", "sentencepiece", "bytes", "Unigram"])
def test_a_long_text_takes_linear_time(kind: str) -> None:
    """Counted in tokens decoded, with a stop string, in a text that is all bytes or all spaces."""
    tokenizer = KINDS[kind]()
    text = "  " * 4000 if kind == "Unigram" else "日本🙂" * 400
    ids, decoded = tokenizer.encode(text) if kind != "Unigram" else [tokenizer.encode("a ")[0]] * 4000, 0
    whole, original = tokenizer.decode(ids), tokenizer.decode

    def counted(some: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return original(some)

    tokenizer.decode = counted  # type: ignore[method-assign]
    stream = TextStream(tokenizer, ids[:1], ["never"])
    assert stream.beginning + "".join(map(stream.push, ids[1:])) + stream.end() == whole
    assert decoded < 40 * len(ids), f"{decoded} tokens decoded for {len(ids)}"
