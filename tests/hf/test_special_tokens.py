"""BOS, EOS and padding: imported and exported tokenizers give the ids that Transformers gives from the same folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from moe_mamba.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.hf import tokenizer_files
from tests.data.tokenizer_kinds import (
    gpt2_like,
    llama,
    named,
    save_library,
    sentencepiece_model,
    special,
    unigram,
    wordpiece,
)

transformers = pytest.importorskip("transformers")
TEXTS = ["", "the cat", "the  other\n", "日本語 🙂", "a.", "é" * 30, "\ufeffa"]
Make = Callable[[Path], Path]


def _with(library: Any, processor: Any) -> Any:
    library.post_processor = processor
    return library


def _template(single: str, **ids: int) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=[(f"<{n}>", i) for n, i in ids.items()])


def _sentencepiece(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    return folder


def _two_files(folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt."""
    model = json.loads(gpt2_like().to_str())["model"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **config}))
    return folder


BYTE_LEVEL = processors.ByteLevel(trim_offsets=True)
END = "<|endoftext|>"
FOLDERS: dict[str, tuple[Make, list[str]]] = {
    # name -> folder, what stands before every text
    "Llama": (lambda path: save_library(llama(beginning=True), path, bos_token="<s>"), ["<s>"]),
    "nothing": (lambda path: save_library(llama(), path, bos_token="<s>"), []),
    "nothing, though it is asked for": (
        lambda path: save_library(llama(), path, bos_token="<s>", add_bos_token=True), []
    ),
    "BOS, though it is forbidden": (
        lambda path: save_library(llama(beginning=True), path, bos_token="<s>", add_bos_token=False), ["<s>"]
    ),
    "unnamed": (lambda path: save_library(llama(beginning=True), path), ["<s>"]),
    "two": (
        lambda path: save_library(_with(llama(), _template("<s> <unk> $A", s=1, unk=0)), path), ["<s>", "<unk>"]
    ),
    "Llama 3": (
        lambda path: save_library(
            _with(gpt2_like(), processors.Sequence([BYTE_LEVEL, _template("<he> $A", he=256)])),
            path, eos_token=END, bos_token="he",
        ), ["he"]
    ),
    "end-of-text, as OPT": (
        lambda path: save_library(_with(unigram(), _template("</s> $A", **{"/s": 2})), path, bos_token="</s>"), ["</s>"]
    ),
    "GPT-2": (lambda path: save_library(_with(gpt2_like(), BYTE_LEVEL), path, eos_token=END, bos_token=END), []),
    "SentencePiece": (lambda path: _sentencepiece(path, add_bos_token=True), ["<s>"]),
    "SentencePiece, named": (lambda path: _sentencepiece(path, add_bos_token=True, bos_token="<s>"), ["<s>"]),
    "SentencePiece, none": (lambda path: _sentencepiece(path, add_bos_token=False), []),
    "SentencePiece, unsaid": (lambda path: _sentencepiece(path), []),
    "two files": (lambda path: _two_files(path, add_bos_token=True, bos_token=END), [END]),
    "two files, none": (lambda path: _two_files(path, bos_token=END), []),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_are_those_of_transformers_in_and_out_again(kind: str, tmp_path: Path) -> None:
    make, before = FOLDERS[kind]
    folder = make(tmp_path / "theirs")
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert tokenizer.encode_prompts(TEXTS) == expected
    assert theirs.convert_ids_to_tokens(list(tokenizer.prefix)) == before and tokenizer.suffix == ()
    plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == plain
    end = [tokenizer.end_of_text]
    behind_end = [] if list(tokenizer.prefix) == end else list(tokenizer.prefix)
    assert tokenizer.encode_documents(TEXTS) == [behind_end + ids + end for ids in plain]

    tokenizer.save(tmp_path / "run")  # what a run keeps
    again = load_tokenizer(tmp_path / "run")
    assert again.encode_prompts(TEXTS) == expected
    assert (again.fingerprint, again.beginning) == (tokenizer.fingerprint, tokenizer.beginning)
    assert (tokenizer.fingerprint == tokenizer.fingerprint_without_prefix) == (not before)

    (tmp_path / "out").mkdir()
    tokenizer_files.write(tokenizer, tmp_path / "out", tokenizer.vocab_size)
    out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [out(text)["input_ids"] for text in TEXTS] == expected, "BOS twice, or not at all"
    assert out(f"a{out.eos_token}")["input_ids"][-1] == tokenizer.end_of_text == out.eos_token_id
    assert (out.bos_token_id or out.eos_token_id) == tokenizer.beginning


@pytest.mark.parametrize("kind", ["template", "Roberta", "SentencePiece"])
def test_eos_behind_a_text_is_left_out_and_known(kind: str, tmp_path: Path) -> None:
    """Of a prompt that ends with end-of-text nothing follows; the export leaves it out, too."""
    if kind == "SentencePiece":
        folder = _sentencepiece(tmp_path / "theirs", add_bos_token=True, add_eos_token=True)
    else:
        library = llama(beginning=True, ending=True)
        if kind == "Roberta":
            library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
        folder = save_library(library, tmp_path / "theirs", bos_token="<s>")
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.suffix == (tokenizer.end_of_text,)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert [[*ids, *tokenizer.suffix] for ids in tokenizer.encode_prompts(TEXTS)] == expected
    assert tokenizer.encode_documents(TEXTS) == expected
    (tmp_path / "out").mkdir()
    tokenizer_files.write(tokenizer, tmp_path / "out", tokenizer.vocab_size)
    out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [out(text)["input_ids"] for text in TEXTS] == tokenizer.encode_prompts(TEXTS)


def test_the_name_of_bos_in_a_text_is_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_library(llama(beginning=True), tmp_path))
    (ids,) = tokenizer.encode_prompts(["<s>a</s>"])
    assert ids[0] == 1 and not {1, 2} & set(ids[1:])
    assert tokenizer.decode(ids[1:]) == "<s>a</s>"


def test_a_post_processor_that_repeats_a_text_is_refused(tmp_path: Path) -> None:
    library = _with(llama(), _template("$A <s> $A", s=1))
    with pytest.raises(UserError, match="takes the text 2 times"):
        load_tokenizer(save_library(library, tmp_path))


PADDED: dict[str, tuple[Callable[[], Tokenizer], int, str | None]] = {
    # tokenizer, ids that the model has more, pad token; None: end-of-text
    "bytes": (BytesTokenizer, 0, "<|pad|>"),
    "bytes, with room": (BytesTokenizer, 3, "<|pad|>"),
    "byte level": (lambda: named(gpt2_like()), 0, "<|pad|>"),
    "byte level, with room": (lambda: named(gpt2_like()), 1, "<|pad|>"),
    "byte fallback": (lambda: named(llama()), 0, "<|pad|>"),
    "SentencePiece": (lambda: SentencePieceTokenizer(sentencepiece_model()), 0, "<|pad|>"),
    "no room": (lambda: named(wordpiece(False)), 0, None),
    "room": (lambda: named(wordpiece(False)), 1, "<|pad|>"),
    "its own": (lambda: named(_padded(llama())), 5, "<pad>"),
}


def _padded(library: Any) -> Any:
    library.add_special_tokens(special("<pad>"))
    return library


@pytest.mark.parametrize("kind", PADDED)
def test_padding_is_not_end_of_text(kind: str, tmp_path: Path) -> None:
    make, room, name = PADDED[kind]
    tokenizer = make()
    pad = tokenizer_files.write(tokenizer, tmp_path, tokenizer.vocab_size + room)
    out = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert out.pad_token_id == pad < tokenizer.vocab_size + room
    assert len(out) <= tokenizer.vocab_size + room, "no row for it in the embedding"
    assert out.pad_token == (name or out.eos_token)
    draw = random.Random(0)
    odd = "".join(chr(draw.choice([draw.randrange(0x80, 0x250), draw.randrange(0x20, 0xD000)])) for _ in range(3000))
    for text in [*TEXTS, odd, "ÿþýû ÁÀ"]:
        ids = out(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert name is None or pad not in ids
    assert out(["a", "a a a"], padding=True)["input_ids"][0][0] == pad


def test_a_pad_token_that_the_folder_names_is_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_library(llama(), tmp_path / "theirs", pad_token="<unk>"))
    (tmp_path / "out").mkdir()
    assert tokenizer_files.write(tokenizer, tmp_path / "out", tokenizer.vocab_size) == 0


def test_truncation_and_padding_of_a_folder_stay_there(tmp_path: Path) -> None:
    """As here, where no text is cut: also without any added token."""
    library = llama(beginning=True)
    library.enable_truncation(4)
    library.enable_padding(pad_token="<unk>", length=9)
    folder = save_library(library, tmp_path / "theirs")
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    (tmp_path / "out").mkdir()
    tokenizer_files.write(tokenizer, tmp_path / "out", tokenizer.vocab_size)
    out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert out(text)["input_ids"] == tokenizer.encode_prompts([text])[0]
        assert out.backend_tokenizer.encode(text).ids == tokenizer.encode_prompts([text])[0]
