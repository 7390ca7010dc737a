"""Folders that come from anywhere: a tokenizer that works, or one line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.data.text_stream import TextStream
from moe_mamba.data.tokenizer import SymbolsTokenizer, Tokenizer, load_tokenizer
from moe_mamba.data.tokenizer_folder import CONFIG
from moe_mamba.errors import UserError
from tests.data.tokenizer_kinds import gpt2_like, llama, save_library, sentencepiece_model, unigram, wordpiece

INPUTS = 1200
TEXTS = ["", "the cat", "日本 🙂 a<s>"]
Change = Callable[[Any], Any]


def _content() -> dict[str, Any]:
    return json.loads(llama(beginning=True).to_str())


def _with(path: list[Any], value: Any) -> dict[str, Any]:
    content = node = _content()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return content


DEEP = "[" * 100_000
DAMAGED: dict[str, tuple[dict[str, str], str]] = {
    # files beside or instead of a valid tokenizer.json; what the line says
    "a number for EOS": ({CONFIG: '{"eos_token": 5}'}, "eos_token is 5: it must be a token's name"),
    "a list for EOS": ({CONFIG: '{"eos_token": ["</s>"]}'}, "eos_token is"),
    "an empty EOS": ({CONFIG: '{"eos_token": ""}'}, "eos_token is"),
    "EOS of half a character": ({CONFIG: '{"eos_token": "\\ud800"}'}, "eos_token is"),
    "EOS that it lacks": ({CONFIG: '{"eos_token": "<end>"}'}, "no end-of-text token"),
    "a number in EOS": ({CONFIG: '{"eos_token": {"content": 5}}'}, "eos_token is 5"),
    "text for a flag": ({CONFIG: '{"add_bos_token": "yes"}'}, "add_bos_token is .*true or false"),
    "a long value": ({CONFIG: json.dumps({"eos_token": ["x" * 5000]})}, "eos_token is"),
    "a list for the configuration": ({CONFIG: "[]"}, "not a JSON object"),
    "no JSON": ({CONFIG: "{"}, "not JSON"),
    "a deep configuration": ({CONFIG: DEEP}, "not JSON"),
    "no UTF-8": ({CONFIG: "\udcff"}, "not UTF-8 at byte 0"),
    "a list": ({"tokenizer.json": "[]"}, "not a tokenizer.json"),
    "nothing": ({"tokenizer.json": ""}, "not a tokenizer.json"),
    "deep": ({"tokenizer.json": DEEP}, "not a tokenizer.json"),
    "a huge id": (
        {"tokenizer.json": json.dumps(_with(["model", "vocab", "lo"], 2**31))}, "ids up to 2,147,483,648"
    ),
    "a negative id": ({"tokenizer.json": json.dumps(_with(["model", "vocab", "lo"], -1))}, "not a tokenizer.json"),
    "an id past 32 bits": ({"tokenizer.json": json.dumps(_with(["model", "vocab", "lo"], 2**40))}, "not a tokenizer"),
    "an empty vocabulary": (
        {"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}', CONFIG: "{}"},
        "no end-of-text token",
    ),
    "a post-processor of tokens that it lacks": (
        {"tokenizer.json": json.dumps(_with(["post_processor", "special_tokens", "<s>", "ids"], [9999]))}, "the id 9999"
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "symbols of a text": ({"symbols.json": '{"vocab_size": "17"}'}, 'vocab_size is "17"'),
    "symbols of nothing": ({"symbols.json": "{}"}, "vocab_size is null"),
    "symbols of a flag": ({"symbols.json": '{"vocab_size": true}'}, "vocab_size is true"),
    "symbols without end": ({"symbols.json": '{"vocab_size": 99999999999}'}, "vocab_size is 99999999999"),
    "symbols below one": ({"symbols.json": '{"vocab_size": -3}'}, "vocab_size is -3"),
    "a list of symbols": ({"symbols.json": "[17]"}, "not a JSON object"),
    "an empty model": ({"tokenizer.model": ""}, "not a SentencePiece model"),
    "a list of pieces": ({"vocab.json": "[1]", "merges.txt": ""}, "not a JSON object"),
    "pieces of text": ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "not a tokenizer.json"),
    "deep pieces": ({"vocab.json": DEEP, "merges.txt": ""}, "not JSON"),
    "merges of nothing": (
        {"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "x y\n"}, "not a tokenizer.json"
    ),
    "BOS that is added and is not there": (
        {
            "vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "",
            CONFIG: '{"add_bos_token": true, "bos_token": "b"}',
        },
        "b is to be added to every text, but vocab.json lacks it",
    ),
}  # fmt: skip


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("kind", [*DAMAGED, *OTHERS])
def test_damaged_folders_are_one_line(kind: str, tmp_path: Path) -> None:
    if kind in DAMAGED:
        save_library(llama(beginning=True), tmp_path)
    files, message = (DAMAGED | OTHERS)[kind]
    _write(tmp_path, files)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) <= 250


def test_holes_in_a_vocabulary_are_no_damage(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(_with(["model", "vocab", "lo"], 400)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 401 and tokenizer.decode([300, *tokenizer.encode("lo"), 350]) == "lo"


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, "vocab.json", "merges.txt"])
def test_a_byte_order_mark_says_nothing(name: str, tmp_path: Path) -> None:
    if name in ("vocab.json", "merges.txt"):
        model = json.loads(gpt2_like().to_str())["model"]
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        _write(tmp_path, {"vocab.json": json.dumps(model["vocab"]), "merges.txt": merges})
    else:
        save_library(llama(beginning=True), tmp_path)
    before = load_tokenizer(tmp_path)
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    after = load_tokenizer(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.encode_prompts(TEXTS) == before.encode_prompts(TEXTS)


def _folders(root: Path) -> list[Path]:
    made = [
        save_library(library, root / str(number))
        for number, library in enumerate((llama(beginning=True), llama(None, True, True), unigram(), wordpiece(True)))
    ]
    save_library(gpt2_like(), root / "gpt2", eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    two = root / "two"
    two.mkdir()
    model = json.loads(gpt2_like().to_str())["model"]
    _write(two, {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "h e\n", CONFIG: '{"add_bos_token": true}'})
    pieces = root / "pieces"
    pieces.mkdir()
    (pieces / "tokenizer.model").write_bytes(sentencepiece_model())
    _write(pieces, {CONFIG: '{"add_bos_token": true, "bos_token": "<s>"}'})
    SymbolsTokenizer(20).save(root / "symbols")
    return [*made, root / "gpt2", two, pieces, root / "symbols"]


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in JSON: (list or object, key); of long lists and objects a few."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    for key in keys[:12] + keys[-2:]:
        found.append((node, key))
        _places(node[key], found)
    return found


VALUES: list[Any] = [
    None, True, False, 0, -1, 5, 2**31, 2**32, 2**63, 10**40, 1e308, 0.5, # numbers
    "", "a", "</s>", "\ud800", "\0", "x" * 3000,
    [], {}, [[]], ["a"], {"a": {}}, {"type": "Nothing"}, {"String": ""}, {"Regex": "("}, {"Regex": "(a*)*$"},
    {"content": 3},
]  # fmt: skip


def _damage(path: Path, draw: random.Random) -> None:
    """One value of JSON becomes another, or is left out; or bytes change, go, or are doubled."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.8:
        node = json.loads(content)
        for _ in range(draw.choice((1, 1, 2))):
            places = _places(node, [])
            if not places:
                break
            parent, key = draw.choice(places)
            if draw.random() < 0.2:
                del parent[key]
            else:
                parent[key] = draw.choice(VALUES)
        path.write_text(json.dumps(node))
        return
    start = draw.randrange(len(content) + 1)
    changed = draw.choice((b"", content[start : start + 40] * 2, b"\xff", b"\0", b"[" * 5000, b"\xef\xbb\xbf"))
    kept = content[start + draw.choice((0, 1, 60)) :] if draw.random() < 0.8 else b""
    path.write_bytes(content[:start] + changed + kept)


def _use(tokenizer: Tokenizer, folder: Path) -> None:
    """What a run does with a tokenizer."""
    texts = ["3 1", ""] if isinstance(tokenizer, SymbolsTokenizer) else TEXTS
    assert len(tokenizer.fingerprint) == 64 and 0 <= tokenizer.end_of_text < tokenizer.vocab_size <= 1 << 24
    tokenizer.save(folder)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    for ids in tokenizer.encode_prompts(texts) + tokenizer.encode_documents(texts):
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        stream = TextStream(tokenizer, ids[: len(ids) // 2], ["e"])
        stream.beginning + "".join(map(stream.push, ids[len(ids) // 2 :])) + stream.end()


@pytest.mark.slow
def test_no_damage_is_more_than_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _try_damage(tmp_path, capfd, INPUTS)


def test_no_damage_is_more_than_one_line_in_short(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _try_damage(tmp_path, capfd, INPUTS // 6)


def _try_damage(root: Path, capfd: pytest.CaptureFixture[str], inputs: int) -> None:
    draw, folders = random.Random(inputs), _folders(root)
    refused = 0
    for number in range(inputs):
        folder = root / "damaged"
        shutil.copytree(draw.choice(folders), folder)
        path = draw.choice(sorted(folder.iterdir()))
        _damage(path, draw)
        try:
            _use(load_tokenizer(folder), root / "saved")
        except UserError as error:
            line = str(error).replace(str(root), "")
            assert "\n" not in line and len(line) <= 300, (number, line)
            refused += 1
        except BaseException as error:
            kept = root.parent / f"damaged-{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            raise AssertionError(f"input {number} of {inputs}, in {kept}: {error!r}") from error
        printed = capfd.readouterr()
        assert printed == ("", ""), (number, printed)
        shutil.rmtree(folder)
        shutil.rmtree(root / "saved", ignore_errors=True)
    with capfd.disabled():
        print(f"\n{inputs} damaged tokenizer folders: {refused} refused, {inputs - refused} work", end="")
    assert inputs // 4 < refused < inputs, f"{refused} of {inputs} were refused"
