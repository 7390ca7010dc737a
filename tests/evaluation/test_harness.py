"""What a model tells EleutherAI's harness: every number against one pass over one request, in float64."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from moe_mamba.config import Config
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from moe_mamba.evaluation import harness
from moe_mamba.evaluation.harness import HarnessModel
from moe_mamba.model.generation import generate
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.loss import cross_entropy_sum
from moe_mamba.run.restore import Restored

END = 256
UNIFORM = -math.log(260)
TINY = {"repeat": 1, "d_model": 16, "vocab_size": 260, "d_state": 4, "heads": 4, "kv_heads": 2, "d_ff": 24}
PAIRS = [
    ("one two three", " four"),
    ("a", "b"),
    ("one two three", " four and then many more"),
    ("a longer context of many words", " end"),
    ("one two three", " f"),
    ("é", "£ and €"),
]
Build = Callable[..., HarnessModel]


@pytest.fixture
def build() -> Build:
    def model(
        pattern: str = "ME", reset: bool = True, batch: int = 4, max_length: int = 64, **moe: Any
    ) -> HarnessModel:
        config = Config(
            model={"pattern": pattern, **TINY},
            moe={"experts": 4, "d_expert": 16, **moe},
            data={"reset_at_document": reset},
        )
        built = LanguageModel(config.model, config.moe)
        initialize(built, 0)
        built.double().embedding.weight.data *= 20  # so that what stands before matters
        return HarnessModel(Restored(built, BytesTokenizer(), config, Path()), batch=batch, max_length=max_length)

    return model


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def alone(model: HarnessModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pass over one request: its cross entropy, and whether greedy text is the continuation."""
    network = model._model
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = network(tokens[:, :-1]).logits[0, len(context) - 1 :]
    loss, count = cross_entropy_sum(logits, tokens[0, len(context) :])
    assert count == len(continuation)
    return -loss.item(), logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("pattern", ["ME", "M*-E"])
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_are_those_of_each_request_by_itself_in_the_order_asked(build: Build, pattern: str, batch: int) -> None:
    model = build(pattern, batch=batch, router="top_k", top_k=2)
    greedy = list(generate(model._model, list(b"one two three"), 3, temperature=0))
    pairs = [(list(before.encode()), list(after.encode())) for before, after in PAIRS]
    pairs[4:4] = [(list(b"one two three"), greedy), (list(b"one two three"), [*greedy[:2], greedy[2] ^ 1])]
    got = model._loglikelihood_tokens([((), *pair) for pair in pairs])
    expected = [alone(model, *pair) for pair in pairs]
    assert [score.log_probability for score in got] == pytest.approx([each[0] for each in expected], rel=1e-9)
    assert [score.is_greedy for score in got] == [each[1] for each in expected]
    assert [got[4].is_greedy, got[5].is_greedy] == [True, False]


def test_texts_are_split_into_tokens_as_the_harness_does(build: Build) -> None:
    model = build()
    got = model.loglikelihood(requests("loglikelihood", [("one ", "two"), ("one", " two"), (" ", "x"), ("one", "")]))
    assert got[0] == got[1]  # a space belongs to what follows it
    assert got[1].log_probability == pytest.approx(alone(model, list(b"one"), list(b" two"))[0])
    assert got[2].log_probability == pytest.approx(UNIFORM + alone(model, [32], list(b"x"))[0])  # no context is left
    assert got[3] == (0.0, True)


def test_a_continuation_that_melts_into_its_context_is_scored_by_itself(build: Build) -> None:
    class Merging(BytesTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return super().encode_batch([text.replace("ab", "c") for text in texts])

    model = build()
    model._tokens = Merging()
    (score,) = model.loglikelihood(requests("loglikelihood", [("xa", "b")]))
    assert score.log_probability == pytest.approx(alone(model, list(b"xa"), list(b"b"))[0])


def test_a_shared_context_is_read_once(build: Build) -> None:
    model, read = build(), []
    model._model.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    model.loglikelihood(requests("loglikelihood", [("c" * 50, choice) for choice in (" a", " b", " c", " d")]))
    assert sum(read) == 49 + 4 * 2


def test_of_whole_texts_no_state_is_left_to_read(build: Build) -> None:
    model, read = build(), []
    model._model.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    model.loglikelihood_rolling(requests("loglikelihood_rolling", [("twelve chars",)]))
    assert sum(read) == 11


def test_long_requests_go_through_in_shards(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(before * 2, after * 3) for before, after in PAIRS]
    whole = build("M*E", max_length=1000).loglikelihood(requests("loglikelihood", pairs))
    monkeypatch.setattr(harness, "CHUNK", 5)
    monkeypatch.setattr(harness, "LOGITS", 1000)
    shards = build("M*E", max_length=1000).loglikelihood(requests("loglikelihood", pairs))
    assert [score.log_probability for score in shards] == pytest.approx([score.log_probability for score in whole])


def test_of_a_long_context_the_last_tokens_count(build: Build) -> None:
    model = build("*E", max_length=8)
    got = model.loglikelihood(requests("loglikelihood", [("0123456789", "abc"), ("x", "abc"), ("xy", "a" * 20)]))
    expected = [alone(model, list(b"456789"), list(b"abc")), alone(model, list(b"x"), list(b"abc"))]
    expected.append(alone(model, list(b"y"), list(b"a" * 20)))
    assert [score.log_probability for score in got] == pytest.approx([each[0] for each in expected])
    assert (model.truncated, model.asked) == (2, 3)
    greedy = {"until": [], "max_gen_toks": 12, "do_sample": False}
    long, short = model.generate_until(requests("generate_until", [("xxxx01234567", greedy), ("01234567", greedy)]))
    assert long == short
    assert (model.truncated, model.asked) == (3, 5)


def test_the_first_token_of_a_text_follows_end_of_text_or_costs_as_much_as_any(build: Build) -> None:
    text = list(b"text")
    pairs = [("", "text"), ("", "t")]
    after_end = build(reset=False)
    (whole, first) = after_end.loglikelihood(requests("loglikelihood", pairs))
    assert whole.log_probability == pytest.approx(alone(after_end, [END], text)[0])
    assert first.log_probability == pytest.approx(alone(after_end, [END], text[:1])[0])
    anew = build(reset=True)
    (whole, first) = anew.loglikelihood(requests("loglikelihood", pairs))
    assert whole.log_probability == pytest.approx(UNIFORM + alone(anew, text[:1], text[1:])[0])
    assert first == (pytest.approx(UNIFORM), False)
    (score,) = anew._loglikelihood_tokens(
        [((), [END], [*text[:1], *generate(anew._model, text[:1], 3, temperature=0)])]
    )
    assert not score.is_greedy  # the others are the most probable, but the first has nothing to follow


@pytest.mark.parametrize("reset", [True, False])
def test_whole_texts_are_scored_in_windows(build: Build, reset: bool) -> None:
    model = build(reset=reset, max_length=8)
    text = b"0123456789abcdefghi"
    got = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text.decode(),), ("",), ("short",)]))
    first = UNIFORM + alone(model, [48], list(text[1:8]))[0] if reset else alone(model, [END], list(text[:8]))[0]
    # Windows of 8 inputs; the last one is whole, and counts the tokens that are left.
    total = first + alone(model, [text[7]], list(text[8:16]))[0] + alone(model, list(text[10:16]), list(text[16:]))[0]
    assert got[0] == pytest.approx(total)
    assert got[1] == 0
    assert math.isfinite(got[2])
    assert model.truncated == 0


def test_texts_are_written_as_a_task_asks(build: Build) -> None:
    model = build("M*E")
    argmax = model._tokens.decode(list(generate(model._model, list(b"prompt"), 12, temperature=0, end_of_text=END)))

    def write(*arguments: tuple[str, dict]) -> list[str]:
        return model.generate_until(requests("generate_until", list(arguments)))

    greedy = {"until": [], "max_gen_toks": 12, "do_sample": False}
    stop = argmax[4:6]
    stopped, other, whole = write(("prompt", greedy | {"until": [stop]}), ("x", greedy), ("prompt", greedy))
    assert whole == argmax
    assert stopped == argmax[: argmax.index(stop)]
    assert other == write(("x", greedy))[0]
    drawing = {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_gen_toks": 12, "until": "no such end"}
    first, second = write(("prompt", drawing), ("prompt", drawing))
    assert [first, second] == write(("prompt", drawing), ("prompt", drawing))
    assert len({first, second, argmax}) == 3
    model.batch = 1
    assert [first, second] == write(("prompt", drawing), ("prompt", drawing))
    beginning = generate(model._model, [END], 12, temperature=0, end_of_text=END)
    assert write(("", greedy))[0] == model._tokens.decode(list(beginning))
    with pytest.raises(UserError, match="generation_kwargs: num_beams is unknown"):
        write(("prompt", greedy | {"num_beams": 2}))


def test_models_without_likelihoods_are_refused(build: Build) -> None:
    with pytest.raises(UserError, match="looks ahead at later tokens"):
        build(router="expert_choice", capacity_factor=1.0, balance="none")
    with pytest.raises(UserError, match="drops a token by what else is in its batch"):
        build(evaluation_capacity=1.0)
    build("M", router="expert_choice", capacity_factor=1.0, balance="none")
