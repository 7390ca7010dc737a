"""Our tokenizers as files that Transformers' AutoTokenizer loads as a fast one, with the same ids.

The ids are the same for every text that holds no special token's name. Such a name is that token here, as Transformers
and what builds on it expect: trainers end a text with the name of end-of-text. In training it is the characters that it
is, and ``split_special_tokens=True`` says so to Transformers. SentencePiece models that others trained differ in two
more ways: a unigram model may split a text otherwise where two splits score alike, and with a dummy prefix (Llama's) a
text that holds SentencePiece's own mark for a space has other ids.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from moe_mamba.data.sentencepiece_tokenizer import SPACE
from moe_mamba.data.tokenizer import END_OF_TEXT, LibraryTokenizer, SentencePieceTokenizer, SymbolsTokenizer, Tokenizer
from moe_mamba.data.tokenizer_folder import template
from moe_mamba.errors import UserError
from moe_mamba.hf.padding_token import add_padding, content_name, names_of

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ORIGINAL = "original_tokenizer"  # holds a tokenizer of ours as it was, for the way back in: shards know its fingerprint
UNIGRAM, BPE = 1, 2  # SentencePiece's own numbers


def write(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> int:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; one that they translate also as it is, into a subfolder.

    The tokenizer pads on the left, as a batch of prompts wants it, with a token of its own: collators take the loss off
    every pad token, and with end-of-text for one a model would never learn to stop. See ``add_padding``.

    Args:
        tokenizer: of the model.
        folder: where to.
        vocab_size: of the model: no id may reach it.

    Returns:
        Id of the pad token; end-of-text's where the vocabulary has no room for another.

    Raises:
        UserError: a SentencePiece model of a kind that the ``tokenizers`` library lacks.
    """
    content = _content(tokenizer)
    end = content_name(content, tokenizer.end_of_text)
    named = tokenizer.names.pad if isinstance(tokenizer, LibraryTokenizer) else None
    pad = add_padding(content, end, named, vocab_size) or end
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.beginning != tokenizer.end_of_text:
        config["bos_token"] = content_name(content, tokenizer.beginning)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / ORIGINAL)
    return names_of(content)[pad]


def beginning_of(folder: Path) -> str:
    """Name of BOS in a folder that ``write`` wrote; end-of-text's where it stands for both."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return config.get("bos_token", config["eos_token"])


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as tokenizer.json has it."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.exported_content()
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = json.loads(_from_sentencepiece(tokenizer).to_str())
        if tokenizer.prefix:
            before = {tokenizer.processor.id_to_piece(token): [token] for token in tokenizer.prefix}
            content["post_processor"] = template(before, {})
        return content
    return json.loads(
        (_symbols(tokenizer.vocab_size) if isinstance(tokenizer, SymbolsTokenizer) else _bytes()).to_str()
    )


def _bytes() -> Library:
    """Every character falls back to its bytes, because the vocabulary has no other one."""
    vocabulary = {name: byte for byte, name in enumerate(BYTES)} | {END_OF_TEXT: len(BYTES)}
    library = Library(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([_special(END_OF_TEXT)])
    return library


def _symbols(vocab_size: int) -> Library:
    """Numbers with spaces between them; decoding puts the spaces back."""
    library = Library(models.WordLevel({str(number): number for number in range(vocab_size - 1)}))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([_special(END_OF_TEXT)])
    return library


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Library:
    """The model's pieces, with real spaces where they have SentencePiece's mark.

    So a real mark in a text is a character that no piece has, and falls back to its bytes as in our tokenizer.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(tokenizer.model)
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = {kind.name: kind.number for kind in proto.SentencePiece.DESCRIPTOR.enum_types_by_name["Type"].values}
    names = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    normal = [piece.type == kinds["NORMAL"] for piece in proto.pieces]
    fallback = {"byte_fallback": spec.byte_fallback}
    if spec.model_type == BPE:
        model: Any = models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_merges(names, scores, normal),
            unk_token=names[tokenizer.processor.unk_id()],
            fuse_unk=True,
            **fallback,
        )
    elif spec.model_type == UNIGRAM:
        model = models.Unigram(list(zip(names, scores, strict=True)), unk_id=tokenizer.processor.unk_id(), **fallback)
    else:
        raise UserError(
            "the tokenizer is a SentencePiece model of words or characters, which the tokenizers library lacks: "
            "only byte-pair and unigram models are exported"
        )
    library = Library(model)
    steps = _normalizers(rules)
    if steps:
        library.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [name for name, piece in zip(names, proto.pieces, strict=True) if piece.type == kinds["CONTROL"]]
    library.add_special_tokens([_special(name) for name in control])
    own = [name for name, piece in zip(names, proto.pieces, strict=True) if piece.type == kinds["USER_DEFINED"]]
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in own])
    return library


def _normalizers(rules: Any) -> list[Any]:
    """What a SentencePiece model does to a text first; ours do nothing."""
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _merges(names: list[str], scores: list[float], normal: list[bool]) -> list[tuple[str, str]]:
    """Byte-pair merges, best first: SentencePiece merges any two neighbours that make a piece, the best piece first.

    Of neighbours that make the same piece it takes the leftmost, which merges have no word for; with the longer left
    part first, a run of one character comes out alike.
    """
    known = {name for name, is_normal in zip(names, normal, strict=True) if is_normal}
    ranked = [
        (-score, -cut, name[:cut], name[cut:])
        for name, score, is_normal in zip(names, scores, normal, strict=True)
        if is_normal
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]
    return [(left, right) for _, _, left, right in sorted(ranked, key=lambda merge: merge[:2])]
