"""Texts as they grow: BOS is read and not shown, and what is shown is what all tokens say."""

from pathlib import Path

import pytest
import torch

from moe_mamba.data.tokenizer import LibraryTokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.model.sampling import Sampling
from moe_mamba.run.restore import open_trained, restore
from moe_mamba.run.writing import TextScreen, start_texts, write_all
from tests.data.tokenizer_kinds import llama, named, save_library
from tests.hf.checkpoints import make_run


def test_bos_is_read_and_not_shown() -> None:
    tokenizer = named(llama(beginning=True))
    for prompt in ("the 日本", "", "<s>"):
        (text,) = start_texts(tokenizer, [prompt], 0, [])
        assert text.tokens == [1, *tokenizer.encode(prompt)]
        for token in tokenizer.encode("語 the"):
            text.add(token)
        text.end("length")
        assert text.text == tokenizer.decode([*text.tokens[1:], *text.new])


def test_what_a_model_writes_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that writes any bytes, and ids that its tokenizer lacks."""
    tokenizer = named(llama(beginning=True))
    make_run(tmp_path / "run", {"pattern": "M", "vocab_size": 300}, tokenizer=tokenizer)
    restored = restore(tmp_path / "run", torch.device("cpu"))
    texts = start_texts(restored.tokenizer, ["the 日", "a"], 0, ["\n"])
    write_all(restored, texts, Sampling(1.0), 2, 0, 60, TextScreen(texts, is_numbered=False, is_json=False))
    for text in texts:
        whole = tokenizer.decode([*text.tokens[1:], *text.new])
        assert text.text == (whole.split("\n")[0] if text.ended_by == "stop" else whole)
        assert text.text in capsys.readouterr().out or text is not texts[0]


def test_a_checkpoint_from_before_bos_says_so(tmp_path: Path) -> None:
    """Of a tokenizer that adds BOS, which once was left out; without its post-processor it goes on."""

    class Older(LibraryTokenizer):
        fingerprint = named(llama()).fingerprint  # type: ignore[assignment]

    folder = save_library(llama(beginning=True), tmp_path / "tokenizer")
    older = Older((folder / "tokenizer.json").read_text(), "older")
    make_run(tmp_path / "run", {"pattern": "M", "vocab_size": 300}, tokenizer=older)
    with pytest.raises(UserError, match=r"was trained without the BOS .* set post_processor to null"):
        open_trained(tmp_path / "run")
    save_library(llama(), tmp_path / "run" / "tokenizer")
    assert open_trained(tmp_path / "run").tokenizer.prefix == ()
    assert load_tokenizer(folder).fingerprint != older.fingerprint
