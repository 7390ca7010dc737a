"""What experts specialise in: figures against loops over tokens, chance, planted routers, and the command."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_mamba.commands.experts import main
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.data.prepare import prepare_corpus
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.evaluation.choices import Choices, Text, assignments, choices_of
from moe_mamba.evaluation.information import (
    against_chance,
    beyond_chance,
    mutual_information,
    normalised_information,
)
from moe_mamba.evaluation.specialisation import agreements, bucket, findings
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import Router
from moe_mamba.model.sequences import Sequences
from tests.hf.checkpoints import make_run

N, EXPERTS, WORDS = 20_000, 8, 50
RANDOM = np.random.default_rng(3)


def by_hand(one: list[int], other: list[int]) -> tuple[float, float, float]:
    """Both entropies and the mutual information, in bits, from the definition: a sum over pairs."""
    pairs, first, second, n = Counter(zip(one, other, strict=True)), Counter(one), Counter(other), len(one)
    information = sum(c / n * math.log2(c * n / (first[a] * second[b])) for (a, b), c in pairs.items())
    entropies = [-sum(c / n * math.log2(c / n) for c in count.values()) for count in (first, second)]
    return entropies[0], entropies[1], information


def test_information_is_that_of_the_definition() -> None:
    one = RANDOM.integers(0, 5, 700)
    other = np.where(RANDOM.random(700) < 0.4, one, RANDOM.integers(0, 9, 700))
    a, b, expected = by_hand(one.tolist(), other.tolist())
    assert expected > 0.1
    assert mutual_information(one, other) == pytest.approx(expected, abs=1e-12)
    assert normalised_information(one, other) == pytest.approx(2 * expected / (a + b), abs=1e-12)
    assert normalised_information(one, (one + 2) % 5) == pytest.approx(1)
    assert math.isnan(normalised_information(one * 0, one * 0))


def test_chance_has_the_bias_of_a_finite_sample() -> None:
    one, other = RANDOM.integers(0, EXPERTS, N), RANDOM.integers(0, WORDS, N)
    measure = against_chance(mutual_information, one, other, shuffles=10)
    assert measure.shuffled == pytest.approx((EXPERTS - 1) * (WORDS - 1) / (2 * N * math.log(2)), rel=0.15)
    assert abs(measure.beyond) < 5 * measure.spread


def text_of(ids: np.ndarray, length: int = 100) -> Text:
    return Text(ids, np.arange(len(ids)) % length, len(ids) // length)


def choices_by(expert: np.ndarray) -> Choices:
    return Choices(np.arange(len(expert)), expert, expert, EXPERTS, looks_ahead=False)


def test_a_random_router_specialises_in_nothing() -> None:
    ids = np.minimum(RANDOM.zipf(1.5, N), WORDS) - 1
    found = findings(text_of(ids), choices_by(RANDOM.integers(0, EXPERTS, N)), str)
    assert abs(found.token.beyond) < 5 * found.token.spread and abs(found.position.beyond) < 5 * found.position.spread
    assert not any(expert.words for expert in found.experts) and all(expert.special == 0 for expert in found.experts)
    assert found.entropy == pytest.approx(3, abs=0.01)


def test_a_router_by_token_gives_the_tokens_that_were_planted() -> None:
    """Each word has an expert of its own, which gets it with probability 0.6 and else by chance."""
    ids = RANDOM.integers(0, WORDS, N)
    expert = np.where(RANDOM.random(N) < 0.6, ids % EXPERTS, RANDOM.integers(0, EXPERTS, N))
    found = findings(text_of(ids), choices_by(expert), lambda word: f"w{word}", words=WORDS)
    shares = np.full((WORDS, EXPERTS), 0.4 / EXPERTS)
    shares[np.arange(WORDS), np.arange(WORDS) % EXPERTS] += 0.6
    load = shares.mean(0)
    planted = (shares * np.log2(shares / load)).sum() / WORDS
    assert found.token.beyond == pytest.approx(planted, abs=0.02)
    assert abs(found.position.beyond) < 5 * found.position.spread
    for one in found.experts:
        assert {word.id for word in one.words} == set(range(one.number, WORDS, EXPERTS))
        for word in one.words:
            mine = (expert == one.number) & (ids == word.id)
            assert (word.count, word.text) == (mine.sum(), f"w{word.id}")
            assert word.share == pytest.approx(mine.sum() / (ids == word.id).sum())
            assert word.lift == pytest.approx(word.share / (expert == one.number).mean())
        assert one.special == pytest.approx(np.isin(ids[expert == one.number], [w.id for w in one.words]).mean())


def test_a_router_by_place_gives_the_places_that_were_planted() -> None:
    text = text_of(RANDOM.integers(0, WORDS, N))
    found = findings(text, choices_by(bucket(text.position) % EXPERTS), str)
    assert found.position.value == pytest.approx(found.entropy)  # the place decides the expert
    assert abs(found.token.beyond) < 5 * found.token.spread
    assert found.experts[0].positions[0] == pytest.approx(1 / found.experts[0].load)
    assert bucket(np.array([0, 1, 2, 3, 6, 7, 14, 15])).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_seeds_agree_whatever_the_numbers_of_their_experts() -> None:
    one = RANDOM.integers(0, EXPERTS, N)
    other = np.where(RANDOM.random(N) < 0.5, one, RANDOM.integers(0, EXPERTS, N))
    runs = {"a": one, "b": (one * 3 + 1) % EXPERTS, "c": other, "d": RANDOM.integers(0, EXPERTS, N)}
    words = RANDOM.integers(0, WORDS, N)
    pairs = agreements(words, {name: {"1": choices_by(expert)} for name, expert in runs.items()}, shuffles=4)
    found = {pair.runs: pair.routers["1"] for pair in pairs}
    assert found["a", "b"].value == pytest.approx(1)
    a, b, information = by_hand(one.tolist(), other.tolist())
    assert found["a", "c"].value == pytest.approx(2 * information / (a + b), abs=1e-12)
    assert abs(found["a", "d"].beyond) < 5 * found["a", "d"].spread and found["a", "c"].beyond > 0.1
    left = Choices(np.arange(N), one, np.where(np.arange(N) < 9, -1, one), EXPERTS, looks_ahead=False)
    (pair,) = agreements(words, {"left": {"1": left, "2": left}, "b": {"1": choices_by(runs["b"])}}, 2)
    assert list(pair.routers) == ["1"] and pair.routers["1"].value == pytest.approx(1)  # tokens that both took


def test_what_tokens_explain_of_an_agreement_is_told_apart() -> None:
    """By token alone, nothing is left among equal tokens; by the token before alone, all of it is."""
    words = RANDOM.integers(0, WORDS, N)
    before = np.roll(words, 1)
    kept = [RANDOM.random(N) < 0.7 for _ in range(2)]
    for labels, is_by_token in ((words, True), (before, False)):
        one, other = (np.where(mine, labels % EXPERTS, RANDOM.integers(0, EXPERTS, N)) for mine in kept)
        (pair,) = agreements(words, {"a": {"1": choices_by(one)}, "b": {"1": choices_by(other)}})
        everywhere, equal = pair.routers["1"], pair.equal_tokens["1"]
        assert everywhere.value == equal.value > 0.2 and everywhere.shuffled < 0.01
        assert (abs(equal.beyond) < 5 * equal.spread) == is_by_token
        assert (equal.shuffled < 0.05) != is_by_token


def test_counts_beyond_chance_are_rare_by_chance() -> None:
    """Of 200 independent tables of 8 experts and 500 rare words, about two at most have such a cell."""
    generator = np.random.default_rng(0)
    tables = [generator.multinomial(3000, np.full(4000, 1 / 4000)).reshape(8, 500) for _ in range(200)]
    assert sum(beyond_chance(table)[1].any() for table in tables) <= 6
    lift, special = beyond_chance(np.array([[12, 100], [0, 100]]))
    assert lift[0, 0] == pytest.approx(12 * 212 / (112 * 12)) and lift[1, 0] == 0
    assert not special.any()  # twelve of twelve by a half: 2^-12 is more than a hundredth of a quarter


ROUTINGS: dict[str, dict[str, Any]] = {
    "switch": {},
    "top 2": {"router": "top_k", "top_k": 2},
    "capacity": {"evaluation_capacity": 0.5},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none"},
}


@pytest.mark.parametrize("moe", ROUTINGS.values(), ids=ROUTINGS)
def test_assignments_are_those_of_the_scores(moe: dict[str, Any]) -> None:
    """Compared with each token's best experts, filled up in order, and each expert's best tokens."""
    config = MoEConfig(**{"experts": 4, "capacity_factor": None} | moe)
    router = Router(6, config).eval()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    scores = torch.softmax(x @ router.weight.T, -1).tolist()
    if config.router == "expert_choice":
        halves = [range(10), range(10, 20)]
        expected = {
            (token, expert)
            for half in halves
            for expert in range(4)
            for token in sorted(half, key=lambda token, expert=expert: -scores[token][expert])[:2]
        }
    else:
        best = [sorted(range(4), key=lambda expert, row=row: -row[expert])[: config.top_k] for row in scores]
        room = [2 if config.evaluation_capacity else 20] * 4
        expected = set()
        for token, experts in enumerate(best):
            for expert in experts:
                if room[expert]:
                    room[expert] -= 1
                    expected.add((token, expert))
    with torch.no_grad():
        token, expert, weight = assignments(router(x, Sequences(2, 10))[0])
    pairs = list(zip(token.tolist(), expert.tolist(), strict=True))
    assert len(pairs) == len(expected) and set(pairs) == expected
    torch.testing.assert_close(weight, torch.tensor([scores[token][expert] for token, expert in pairs]))


def test_a_text_is_read_in_whole_windows_with_places_in_documents(tmp_path: Path) -> None:
    """Bytes: "abc" and "defgh", each with its end, again and again, in windows of five."""
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n{"text": "defgh"}\n' * 5)
    tokenizer = load_tokenizer("bytes")
    corpus = prepare_corpus(str(tmp_path / "text.jsonl"), tokenizer, str(tmp_path / "cache"))
    model = LanguageModel(
        ModelConfig(pattern="(ME)M", repeat=1, d_model=8, d_state=2, vocab_size=257),
        MoEConfig(experts=4, inner={"projections": ["conv", "out"], "every": 2}),
    )
    initialize(model, 0)
    for most, windows in ((3, 3), (100, 10)):
        text, choices = choices_of(model, corpus, 5, 4, most, tokenizer.end_of_text, reset=True)
        assert text.windows == windows and list(choices) == ["0.1", "1.conv_router", "1.out_router"]
        expected = [*range(4), *range(6)] * 5
        assert text.position.tolist() == expected[: 5 * windows]
        assert bytes(text.ids[:3].tolist()) == b"abc" and text.ids[3] == tokenizer.end_of_text
        for one in choices.values():
            assert one.token.tolist() == list(range(5 * windows)) and (one.first == one.expert).all()
    assert not any(router._forward_hooks for router in model.routers().values())
    with pytest.raises(UserError, match="not one whole window of 99 tokens"):
        choices_of(model, corpus, 99, 4, 1, tokenizer.end_of_text, reset=False)


CHOICE = {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none"}


@pytest.mark.slow
def test_the_command_writes_tables_numbers_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat. " * 60)
    make_run(Path("one"), {"pattern": "MEE"})
    make_run(Path("two"), {"pattern": "M*E"}, CHOICE)
    make_run(Path("dense"), {"pattern": "M"})
    main("one", "two", input="text.txt", output="out", sequence_length=32, tokens=700, shuffles=3)
    said = capsys.readouterr().out
    found = json.loads(Path("out/experts.json").read_text())
    assert found["read"]["tokens"] == 672 and found["read"]["buckets"] == [2**n - 1 for n in range(10)]
    one, two = found["runs"]
    assert (list(one["routers"]), list(two["routers"])) == (["1", "2"], ["2"])
    assert one["routers"]["2"]["taken"] == 1 > two["routers"]["2"]["taken"] > 0.3
    assert two["routers"]["2"]["looks_ahead"] and "not causal" in said
    (pair,) = found["agreement"]
    assert pair["runs"] == ["one", "two"] and list(pair["routers"]) == ["2"]
    page = Path("out/experts.md").read_text()
    assert "## one, router 1" in page and "not causal" in page and said.splitlines()[2] in page
    word = one["routers"]["1"]["experts"][0]["words"][0]
    assert f"({word['count']}, {word['lift']:.1f})" in page
    assert Path("out/experts.png").read_bytes().startswith(b"\x89PNG")
    assert "dense: model.pattern=M has no experts" in refusal(main, "dense", "--input=text.txt")
    assert "no run is given" in refusal(main)
    assert "--output=text.txt is a file" in refusal(main, "one", "--output=text.txt")
    assert "named twice" in refusal(main, "one", "one")
    assert "one whole window of 9999 tokens" in refusal(main, "one", "--input=text.txt", "--sequence_length=9999")
