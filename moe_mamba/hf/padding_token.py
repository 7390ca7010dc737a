"""A pad token for an exported tokenizer that is not end-of-text, without another row in the embedding."""

import json
from typing import Any

from moe_mamba.data.finality import CHARACTERS

PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")  # in use elsewhere
IN_NO_TEXT = (0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF9, 0xF8, 0xF7, 0xF6, 0xF5, 0xC1, 0xC0)  # bytes that UTF-8 lacks


def add_padding(content: dict[str, Any], end: str, named: str | None, vocab_size: int) -> str | None:
    """Name of the pad token; where there is none yet, it is put into ``content``.

    It is the token that the tokenizer's folder names, or one that other models pad with; else an id that the model has
    and the tokenizer does not; else the token of a byte that no text has, under a new name.

    Args:
        content: as tokenizer.json has it.
        end: end-of-text's name.
        named: pad_token of the folder that the tokenizer came from.
        vocab_size: of the model: no id may reach it.

    Returns:
        The name; None: there is no id for it.
    """
    vocabulary = names_of(content)
    special = {token["content"] for token in content["added_tokens"] if token.get("special")}
    for name in (named, *(name for name in PAD_NAMES if name in special)):
        if name is not None and name != end and vocabulary.get(name, vocab_size) < vocab_size:
            return name
    free = next((name for name in PAD_NAMES if name not in vocabulary), None)
    if free is None:
        return None
    # The library numbers a new token behind all others, if their ids have no holes.
    number = max(vocabulary.values()) + 1
    if number >= vocab_size or number != len(set(vocabulary.values())):
        byte = _unused_byte(content)
        if byte is None or vocabulary[byte] >= vocab_size:
            return None
        number = vocabulary[byte]
        _rename(content["model"], byte, free)
    token = {"id": number, "content": free, "special": True, "normalized": False}
    content["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    content["added_tokens"].sort(key=lambda token: token["id"])
    return free


def names_of(content: dict[str, Any]) -> dict[str, int]:
    """Name -> id of every token."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a unigram model, with scores
        vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content["added_tokens"]}


def content_name(content: dict[str, Any], token: int) -> str:
    """The name of the token with this id."""
    return next(name for name, number in names_of(content).items() if number == token)


def _unused_byte(content: dict[str, Any]) -> str | None:
    """Name of the token of a byte that no text has; None: the tokenizer has no tokens of bytes."""
    model = content["model"]
    vocabulary = names_of({"model": model, "added_tokens": []})
    names = {byte: character for character, byte in CHARACTERS.items()}
    if model.get("byte_fallback"):
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    elif '"ByteLevel"' not in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        return None
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    merged = {part for merge in merges for part in merge}
    added = {token["content"] for token in content["added_tokens"]}
    unused = (names[byte] for byte in IN_NO_TEXT if names[byte] in vocabulary)
    return next((name for name in unused if name not in merged and name not in added), None)


def _rename(model: dict[str, Any], old: str, new: str) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[new, score] if name == old else [name, score] for name, score in vocabulary]
    else:
        model["vocab"] = {new if name == old else name: number for name, number in vocabulary.items()}
