"""Tokenizers: GPT-2's (or any of the ``tokenizers`` library), SentencePiece, bytes, and numbered symbols.

All of them give back the very text they were given, know one end-of-text token, and save themselves into a folder
that ``load_tokenizer`` restores.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_mamba.data.library_tokenizer import LibraryTokenizer
from moe_mamba.data.plain_tokenizers import END_OF_TEXT, BytesTokenizer, SymbolsTokenizer, Tokenizer
from moe_mamba.data.quiet import quiet_hub
from moe_mamba.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_mamba.data.tokenizer_folder import gpt2_content, read_names, read_text, symbols_in
from moe_mamba.errors import UserError

TRAINING_CHARACTERS = 8_000_000  # SentencePiece is trained on so much of the corpus at most


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load ``gpt2``, ``bytes``, a SentencePiece ``.model`` file, or a folder.

    A folder is one that a tokenizer was saved into, or holds tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    if spec == "gpt2":
        return LibraryTokenizer(_download_gpt2(), "gpt2")
    if spec == "bytes":
        return BytesTokenizer()
    if spec == "sentencepiece":
        raise UserError("the sentencepiece tokenizer is trained on a run's corpus: give that run's tokenizer folder")
    if spec == "symbols":
        raise UserError(
            "the symbols tokenizer has as many ids as a run's model.vocab_size: give that run's tokenizer folder"
        )
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    raise UserError(
        f"{spec}: no such tokenizer: give gpt2, bytes, a SentencePiece .model file, or a tokenizer's folder"
    )


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer was saved into ``folder``."""
    kinds = (LibraryTokenizer, SentencePieceTokenizer, BytesTokenizer, SymbolsTokenizer)
    return any((Path(folder) / kind.FILE).is_file() for kind in kinds)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: str | Path) -> SentencePieceTokenizer:
    """Train a SentencePiece model of ``vocab_size`` pieces and save it into ``folder``.

    Byte-pair merges over whole documents, so that line ends and indents merge as well: in a trial on the built-in
    corpus, 2,048 pieces, that took the fewest tokens (3.08 bytes per token; unigram pieces 3.04, single line ends
    2.94), in a tenth of the unigram model's time. The same texts give the same model.

    Raises:
        UserError: the texts cannot give so many pieces, or the pieces are too few for their characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_first_characters(texts, TRAINING_CHARACTERS),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(
            f"no SentencePiece model of {vocab_size} pieces from this corpus ({_reason(error)}): give more "
            "text, or change model.vocab_size (256 of them are bytes)"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(folder)
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _reason(error: RuntimeError) -> str:
    """The library's own words, without the place in its source."""
    return str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(". ") or "no reason given"


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / LibraryTokenizer.FILE).is_file():
        return LibraryTokenizer(read_text(folder / LibraryTokenizer.FILE), str(folder), read_names(folder))
    if (folder / SentencePieceTokenizer.FILE).is_file():
        model = (folder / SentencePieceTokenizer.FILE).read_bytes()
        return SentencePieceTokenizer(model, str(folder), read_names(folder))
    if (folder / BytesTokenizer.FILE).is_file():
        return BytesTokenizer()
    if (folder / SymbolsTokenizer.FILE).is_file():
        return SymbolsTokenizer(symbols_in(folder / SymbolsTokenizer.FILE))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        names = read_names(folder)
        return LibraryTokenizer(gpt2_content(folder, names), str(folder), names)
    raise UserError(
        f"{folder}: it has no tokenizer: it needs tokenizer.json, vocab.json and merges.txt, or tokenizer.model"
    )


def _download_gpt2() -> str:
    """GPT-2's tokenizer.json from the Hugging Face hub, or from its cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache("gpt2", LibraryTokenizer.FILE)
        with quiet_hub():
            path = cached if isinstance(cached, str) else hf_hub_download("gpt2", LibraryTokenizer.FILE)
        return Path(path).read_text(encoding="utf-8")
    except Exception as error:  # no network, no cache, a refusal: the client has a type for each
        raise UserError(
            f"gpt2 cannot be downloaded from the Hugging Face hub ({type(error).__name__}): "
            "give a folder that holds its tokenizer.json, or vocab.json and merges.txt"
        ) from error
