"""The synthetic tasks against their rules, read off only the sequences."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_mamba.data.batch import UNCOUNTED, Batch
from moe_mamba.data.loader import Loader, evaluation_batches
from moe_mamba.data.plain_tokenizers import BytesTokenizer, SymbolsTokenizer
from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.synthetic import SyntheticTask
from moe_mamba.data.tokenizer import holds_tokenizer, load_tokenizer
from moe_mamba.errors import UserError

IDS = 17
SPECIAL = 15  # of induction heads; the marker of selective copying
INDUCTION, COPYING = "synthetic:induction_heads", "synthetic:selective_copying"


def loader(source: str, length: int = 64, seed: int = 0) -> Loader:
    return Loader({source: SyntheticTask.parse(source, IDS)}, {source: 1.0}, length, seed, True, IDS - 1)


def validation(task: SyntheticTask, batch: int) -> list[Batch]:
    return list(evaluation_batches(task, 64, batch, IDS - 1, True))


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.document_starts is None
    return list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))


@pytest.mark.parametrize("queries", [1, 8])
def test_induction_heads_follow_the_rules(queries: int) -> None:
    places, answers = set(), set()
    for tokens, targets in rows(loader(f"{INDUCTION}:queries={queries}").batch(0, 400)):
        special = [place for place, token in enumerate(tokens) if token == SPECIAL]
        first, *asked = special
        assert asked[-1] == len(tokens) - 1
        assert len(asked) <= queries and (queries > 1 or len(asked) == 1)
        answer = tokens[first + 1]
        assert 0 <= answer < SPECIAL
        assert all(tokens[place + 1] == answer for place in asked[:-1])
        assert [place for place, target in enumerate(targets) if target != UNCOUNTED] == asked
        assert {targets[place] for place in asked} == {answer}
        assert max(tokens) <= SPECIAL
        places.add(first)
        answers.add(answer)
    assert answers == set(range(SPECIAL))
    assert min(places) == 0 and max(places) == 61


@pytest.mark.parametrize("memorize", [4, 16, 32])
def test_selective_copying_follows_the_rules(memorize: int) -> None:
    seen = set()
    for tokens, targets in rows(loader(f"{COPYING}:memorize={memorize}").batch(0, 200)):
        body = len(tokens) - memorize
        data = [(place, token) for place, token in enumerate(tokens[:body]) if token != 0]
        assert tokens[body:] == [SPECIAL] * memorize
        assert targets[:body] == [UNCOUNTED] * body
        assert targets[body:] == [token for _, token in data]
        seen |= set(targets[body:])
        if memorize == 32:
            assert [place for place, _ in data] == list(range(32))
    assert seen == set(range(1, SPECIAL))


@pytest.mark.parametrize("source", [f"{INDUCTION}:queries=4", COPYING])
def test_a_sequence_depends_only_on_seed_and_position(source: str) -> None:
    whole = loader(source).batch(0, 40)
    again = loader(source)
    parts = [again.batch(first, 8) for first in (32, 0, 8, 24, 16)]
    for part, number in zip(parts, [4, 0, 1, 3, 2], strict=True):
        assert torch.equal(part.tokens, whole.tokens[8 * number :][:8])
        assert torch.equal(part.targets, whole.targets[8 * number :][:8])
    assert not same(loader(source, seed=1).batch(0, 40), whole)
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 40


def test_validation_is_the_same_for_every_seed_and_not_what_was_trained_on() -> None:
    task = SyntheticTask.parse(f"{INDUCTION}:sequences=40", IDS)
    found = torch.cat([batch.tokens for batch in validation(task, 8)])
    trained = loader(INDUCTION).batch(0, 1000).tokens
    assert len(found) == 40
    assert not {tuple(row) for row in found.tolist()} & {tuple(row) for row in trained.tolist()}


def test_validation_sets_have_their_own_length_and_number() -> None:
    task = SyntheticTask.parse(f"{COPYING}:memorize=8:length=256:sequences=10", IDS)
    batches = validation(task, 16)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(4, 256)] * 3  # as many tokens as 16 of 64
    assert [batch.counted for batch in batches] == [32, 32, 16]
    shapes = {tuple(batch.tokens.shape) for batch in validation(SyntheticTask.parse(COPYING, IDS), 16)}
    assert shapes == {(16, 64)}
    long = SyntheticTask.parse(f"{INDUCTION}:length=4096:sequences=2", IDS)
    assert [tuple(batch.tokens.shape) for batch in validation(long, 16)] == [(1, 4096)] * 2


def test_numbers_of_a_sequence_never_change() -> None:
    """A run goes on with the same sequences on another machine and under another NumPy."""
    induction = loader(f"{INDUCTION}:queries=2", length=12, seed=3).batch(5, 1)
    assert rows(induction)[0][0] == [15, 3, 15, 3, 12, 11, 10, 13, 4, 4, 3, 15]
    copying = loader(f"{COPYING}:memorize=4", length=16, seed=3).batch(5, 1)
    assert rows(copying)[0][0] == [0, 1, 0, 12, 0, 0, 0, 0, 0, 3, 13, 0, 15, 15, 15, 15]


def test_identity_is_of_the_task_and_not_of_its_validation() -> None:
    def identity(source: str, ids: int = IDS) -> str:
        return SyntheticTask.parse(source, ids).identity

    assert identity(INDUCTION) == identity(f"{INDUCTION}:sequences=3:length=99")
    different = {identity(source) for source in (INDUCTION, f"{INDUCTION}:queries=2", COPYING, f"{COPYING}:memorize=3")}
    assert len(different | {identity(INDUCTION, 18)}) == 5


@pytest.mark.parametrize(
    ("source", "ids", "said"),
    [
        ("synthetic:sorting", IDS, "choose among synthetic:induction_heads, synthetic:selective_copying"),
        (f"{INDUCTION}:memorize=4", IDS, "not an option of induction_heads: choose among queries=N"),
        (f"{COPYING}:memorize=0", IDS, "N of at least 1"),
        (f"{COPYING}:16", IDS, "'16' is not an option of selective_copying: choose among memorize=N"),
        (INDUCTION, 3, "set model.vocab_size=4 or more"),
        (COPYING, 4, "set model.vocab_size=5 or more"),
    ],
)
def test_sources_that_make_no_sense_are_refused(source: str, ids: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        SyntheticTask.parse(source, ids)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_sequences_too_short_for_the_task_are_refused() -> None:
    assert loader(INDUCTION, length=3).batch(0, 3).counted == 3
    assert loader(f"{COPYING}:memorize=4", length=8).batch(0, 3).counted == 12
    for source, length, least in ((INDUCTION, 2, 3), (f"{COPYING}:memorize=4", 7, 8)):
        with pytest.raises(UserError, match=f"give {least} or more"):
            loader(source, length=length)
    with pytest.raises(UserError, match=r"data.sequence_length: leave out length="):
        loader(f"{INDUCTION}:length=64")


def test_symbols_are_numbers(tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer("symbols", [INDUCTION], IDS, tmp_path)
    assert isinstance(tokenizer, SymbolsTokenizer)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (IDS, IDS - 1)
    assert tokenizer.encode("3 15\n 0") == [3, 15, 0]
    assert tokenizer.decode(np.array([3, 15, IDS - 1, 0])) == "3 15 <|endoftext|> 0"
    assert holds_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.fingerprint) == (IDS, tokenizer.fingerprint)
    assert SymbolsTokenizer(18).fingerprint != tokenizer.fingerprint
    for text in ("The", "16", "-1", "1.5"):
        with pytest.raises(UserError, match="is not a symbol: give numbers from 0 to 15"):
            tokenizer.encode(text)
    with pytest.raises(UserError, match="give that run's tokenizer folder"):
        load_tokenizer("symbols")
    assert isinstance(prepare_corpus(COPYING, tokenizer, tmp_path), SyntheticTask)


def test_tasks_want_symbols(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data.tokenizer=symbols"):
        prepare_corpus(INDUCTION, BytesTokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"set data.tokenizer=symbols"):
        prepare_tokenizer("sentencepiece", [INDUCTION], IDS, tmp_path)
