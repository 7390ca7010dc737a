"""A tokenizer that puts BOS before texts: the harness is told what its own Hugging Face model tells it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from moe_mamba.convert.from_hf import import_folder
from moe_mamba.convert.to_hf import export
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.evaluation.harness import HarnessModel
from moe_mamba.model.generation import generate
from moe_mamba.run.restore import restore
from tests.data.tokenizer_kinds import llama, save_library
from tests.hf.checkpoints import make_run

pytest.importorskip("transformers")
PAIRS = [("the cat", " sat"), ("", "the rats"), ("the ", "hat 日本"), ("a\n", "<s>x"), ("é", "é"), ("a b c", " d")]
KEYS: dict[str, dict[str, Any]] = {
    "BOS": {"beginning": True},
    "none": {"beginning": False},
}


def _requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(params=KEYS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[HarnessModel, Any]:
    """Ours, and the harness's own, of one model that came in from a folder with such a tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

    folder = save_library(llama(**KEYS[request.param]), tmp_path / "tokenizer", bos_token="<s>")
    tokenizer = load_tokenizer(folder)
    make_run(tmp_path / "run", {"pattern": "M*", "vocab_size": 300}, tokenizer=tokenizer)
    export(tmp_path / "run", tmp_path / "theirs", say=lambda _: None)
    theirs = HFLM(
        pretrained=MoEMambaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=4,
        max_length=64,
    )
    import_folder(tmp_path / "theirs", tmp_path / "again", say=lambda _: None)
    return HarnessModel(restore(tmp_path / "again", torch.device("cpu")), batch=4, max_length=64), theirs


def test_tokens_and_figures_are_those_of_the_harness(both: tuple[HarnessModel, Any]) -> None:
    ours, theirs = both
    plain = [pair for pair in PAIRS if "<s>" not in "".join(pair)]  # which is text here, as in training
    assert ours.prefix_token_id == theirs.prefix_token_id == 1
    for text in [before for before, _ in plain if before]:
        for special in (None, True, False):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(
                text, add_special_tokens=special
            )
    for before, after in [pair for pair in plain if pair[0]]:
        assert ours._encode_pair(before, after) == theirs._encode_pair(before, after)
    for kind, arguments in (("loglikelihood", plain), ("loglikelihood_rolling", [(after,) for _, after in plain])):
        found = getattr(ours, kind)(_requests(kind, arguments))
        expected = getattr(theirs, kind)(_requests(kind, arguments))
        for mine, other in zip(found, expected, strict=True):
            first, second = (mine, other) if kind.endswith("rolling") else (mine.log_probability, other[0])
            assert first == pytest.approx(second, rel=1e-4), kind


def test_a_literal_bos_is_text_behind_the_true_one(both: tuple[HarnessModel, Any]) -> None:
    ours, _ = both
    ids = ours.tok_encode("<s>the")
    assert ids.count(1) == len(ours._tokens.prefix)


def test_written_texts_stop_at_strings_that_are_bytes(both: tuple[HarnessModel, Any]) -> None:
    ours, _ = both
    tokenizer: Tokenizer = ours._tokens
    (prompt,) = tokenizer.encode_prompts(["the 日"])
    new = list(generate(ours._model, prompt, 24, temperature=0, end_of_text=tokenizer.end_of_text))
    shown = tokenizer.without_prefix(prompt)
    text = tokenizer.decode([*shown, *new]).removeprefix(tokenizer.decode(shown))
    stops = [text[place : place + 2] for place in range(0, len(text), 3)]
    for stop in ["never", *stops]:
        settings = {"until": [stop], "max_gen_toks": 24, "do_sample": False}
        (found,) = ours.generate_until(_requests("generate_until", [("the 日", settings)]))
        assert found == text.split(stop)[0], stop
