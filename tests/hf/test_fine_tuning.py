"""Fine-tuning teaches an exported model to stop: EOS is in the texts, and the collator's loss counts it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_mamba.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data.tokenizer_kinds import gpt2_like, llama, named, sentencepiece_model, unigram
from tests.hf.ecosystem import logged, settings
from tests.hf.fine_tuning import TEXTS, exported, written

transformers = pytest.importorskip("transformers")
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": BytesTokenizer,
    "byte level": lambda: named(gpt2_like()),
    "BOS": lambda: named(llama(beginning=True)),
    "no room": lambda: named(unigram()),
    "SentencePiece": lambda: SentencePieceTokenizer(sentencepiece_model()),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no room"])
def test_the_standard_collator_counts_every_end(kind: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(tmp_path, KINDS[kind]()))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([tokenizer(text + tokenizer.eos_token) for text in TEXTS])
    ends = batch["input_ids"] == tokenizer.eos_token_id
    assert ends.sum() == len(TEXTS), "one a text, and none of them padding"
    assert (batch["labels"][ends] == tokenizer.eos_token_id).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bytes", marks=pytest.mark.long),
        pytest.param("BOS", marks=pytest.mark.slow),
        pytest.param("no room", marks=pytest.mark.long),
    ],
)
def test_a_fine_tuned_model_stops(kind: str, tmp_path: Path) -> None:
    """By the code that its own card shows."""
    pytest.importorskip("accelerate")
    folder = exported(tmp_path, KINDS[kind]())
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loading, tuning = blocks[0].replace(f'"{folder.name}"', repr(str(folder))), blocks[1]
    names: dict[str, Any] = {"texts": TEXTS * 4}
    exec(loading, names)
    keys = settings(tmp_path, max_steps=120, learning_rate=0.02, per_device_train_batch_size=6, seed=0)
    del keys["output_dir"]
    names["keys"] = keys
    torch.manual_seed(0)
    exec(tuning.replace('output_dir="tuned"', f"output_dir={str(tmp_path / 'tuned')!r}, **keys"), names)
    losses = logged(names["trainer"], "loss")
    assert losses[-1] < 0.5 < losses[0]
    for text in TEXTS:
        found, stopped = written(names["model"], names["tokenizer"], text[:5])
        assert stopped and found in TEXTS, (found, text)
