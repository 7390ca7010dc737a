"""The files of a tokenizer's folder: read with care, because they come from anywhere."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_mamba.data.plain_tokenizers import END_OF_TEXT
from moe_mamba.errors import UserError, brief

CONFIG = "tokenizer_config.json"
LARGEST_VOCABULARY = 1 << 24  # ids; the largest published ones have 2^18
PUBLISHED = "give the file as its authors publish it"


@dataclass(frozen=True)
class Names:
    """What tokenizer_config.json says of special tokens; None: nothing.

    Attributes:
        end: eos_token, the token that ends a document.
        beginning: bos_token.
        pad: pad_token.
        add_beginning: add_bos_token, which Transformers reads where there is no tokenizer.json.
        add_end: add_eos_token, likewise.
    """

    end: str | None = None
    beginning: str | None = None
    pad: str | None = None
    add_beginning: bool | None = None
    add_end: bool | None = None

    def as_config(self) -> dict[str, Any]:
        """What is not None, under Transformers' keys."""
        return {key: value for attribute, key in KEYS.items() if (value := getattr(self, attribute)) is not None}


KEYS = {
    "end": "eos_token",
    "beginning": "bos_token",
    "pad": "pad_token",
    "add_beginning": "add_bos_token",
    "add_end": "add_eos_token",
}


def read_names(folder: Path) -> Names:
    """Of ``folder``'s tokenizer_config.json; all None where there is none.

    Raises:
        UserError: it is no JSON object, or one of these keys has a value of another type.
    """
    path = folder / CONFIG
    if not path.is_file():
        return Names()
    config = read_object(path)
    flags = ("add_beginning", "add_end")
    return Names(**{name: _value(path, config, key, bool if name in flags else str) for name, key in KEYS.items()})


def _value(path: Path, config: dict[str, Any], key: str, kind: type) -> Any:
    """One key's value; a token may be an object that has it as its content."""
    value = config.get(key)
    if kind is str and isinstance(value, dict):
        value = value.get("content")
    if value is None or (isinstance(value, kind) and value != "" and is_text(value)):
        return value
    wanted = "a token's name" if kind is str else "true or false"
    raise UserError(f"{path}: {key} is {brief(json.dumps(value), 40)}: it must be {wanted}")


def is_text(value: object) -> bool:
    """Whether a string can be written as UTF-8; other values can."""
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({brief(error)}): {PUBLISHED}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object: {PUBLISHED}")
    return content


def read_text(path: Path) -> str:
    """A text file without its byte-order mark, if it has one.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: give the file as it was published") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {PUBLISHED}") from error


def symbols_in(path: Path) -> int:
    """The number of ids that a symbols.json says.

    Raises:
        UserError: it says none.
    """
    size = read_object(path).get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool) or not 2 <= size <= LARGEST_VOCABULARY:
        raise UserError(
            f"{path}: vocab_size is {brief(json.dumps(size), 40)}: it must be a number from 2 to {LARGEST_VOCABULARY:,}"
        )
    return size


def gpt2_content(folder: Path, names: Names) -> str:
    """GPT-2's vocab.json and merges.txt as the tokenizer.json that they stand for.

    Raises:
        UserError: one of them is damaged, or BOS or EOS is to be added and is not in the vocabulary.
    """
    vocabulary = read_object(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").splitlines()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary.get(END_OF_TEXT), "content": END_OF_TEXT, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }
    before = [names.beginning or END_OF_TEXT] if names.add_beginning else []
    behind = [names.end or END_OF_TEXT] if names.add_end else []
    for name in before + behind:
        if name not in vocabulary:
            raise UserError(
                f"{folder / CONFIG}: {brief(name, 40)} is to be added to every text, but vocab.json lacks it: "
                "set add_bos_token and add_eos_token to false, or name tokens that it has"
            )
    if before or behind:
        content["post_processor"] = template(
            {name: [vocabulary[name]] for name in before}, {name: [vocabulary[name]] for name in behind}
        )
    return json.dumps(content, ensure_ascii=False)


def template(before: dict[str, list[int]], behind: dict[str, list[int]]) -> dict[str, Any]:
    """The post-processor, as tokenizer.json has it, that puts tokens (name -> ids) around every text."""

    def around(text: str, number: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": name, "type_id": number}} for name in names] for names in (before, behind)]
        return [*special[0], {"Sequence": {"id": text, "type_id": number}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": ids, "tokens": [name] * len(ids)} for name, ids in (before | behind).items()
        },
    }
