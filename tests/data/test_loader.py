from pathlib import Path

import numpy as np
import pytest
import torch

from moe_mamba.data.loader import UNCOUNTED, Batch, Loader, evaluation_batches
from moe_mamba.data.shards import Shards
from moe_mamba.errors import UserError
from tests.data.conftest import END, write_foreign, write_shards

LENGTH = 32


def make_loader(corpora: dict[str, Shards], weights: dict[str, float] | None = None, **changes: object) -> Loader:
    values = {"sequence_length": LENGTH, "seed": 0, "reset_at_document": False, "end_of_text": END} | changes
    return Loader(corpora, weights or dict.fromkeys(corpora, 1.0), **values)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)


def test_an_epoch_takes_each_window_once(shards: Shards) -> None:
    loader = make_loader({"a": shards})
    windows = (shards.tokens - 1) // LENGTH
    batch = loader.batch(0, windows)
    row = shards.read(0, shards.tokens)
    expected = row[: windows * LENGTH].reshape(windows, LENGTH)
    assert sorted(batch.tokens.tolist()) == sorted(expected.tolist())
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert sorted(loader.places(windows, windows)[1].tolist()) == list(range(windows))


def test_targets_go_on_in_the_next_window(shards: Shards) -> None:
    loader = make_loader({"a": shards})
    corpus, window = loader.places(0, 8)
    batch = loader.batch(0, 8)
    for number in range(8):
        start = int(window[number]) * LENGTH
        assert batch.tokens[number].tolist() == shards.read(start, start + LENGTH).tolist()
        assert batch.targets[number].tolist() == shards.read(start + 1, start + LENGTH + 1).tolist()
    assert not corpus.any()


def test_each_epoch_and_seed_has_its_own_order(shards: Shards) -> None:
    loader = make_loader({"a": shards})
    windows = (shards.tokens - 1) // LENGTH
    first, second = loader.places(0, windows)[1], loader.places(windows, windows)[1]
    other = make_loader({"a": shards}, seed=1).places(0, windows)[1]
    assert (first != second).any()
    assert (first != other).any()
    assert (first != np.arange(windows)).any()


def test_a_run_resumes_at_any_position_in_any_batch(shards: Shards, other_shards: Shards) -> None:
    corpora, weights = {"a": shards, "b": other_shards}, {"a": 3.0, "b": 1.0}
    whole = make_loader(corpora, weights).batch(0, 400)  # several epochs
    for first, count in ((0, 1), (37, 64), (399, 1)):
        part = make_loader(corpora, weights).batch(first, count)
        assert torch.equal(part.tokens, whole.tokens[first : first + count])
        assert torch.equal(part.targets, whole.targets[first : first + count])


def test_the_order_does_not_depend_on_where_the_shards_lie(tmp_path: Path, shards: Shards, texts: list[str]) -> None:
    moved = write_shards(tmp_path, texts)
    assert same(make_loader({"a": shards}).batch(5, 20), make_loader({"another name": moved}).batch(5, 20))


def test_corpora_blend_by_their_weights(shards: Shards, other_shards: Shards) -> None:
    loader = make_loader({"a": shards, "b": other_shards}, {"b": 1, "a": 4})
    corpus, window = loader.places(0, 1000)
    assert (corpus == 0).sum() == 800
    assert abs((corpus[:50] == 0).sum() - 40) <= 1
    windows = (other_shards.tokens - 1) // LENGTH
    assert sorted(window[corpus == 1][:windows].tolist()) == list(range(windows))


def test_resets_mark_starts_and_leave_out_targets_across_documents(shards: Shards) -> None:
    plain, reset = make_loader({"a": shards}), make_loader({"a": shards}, reset_at_document=True)
    expected, batch = plain.batch(0, 20), reset.batch(0, 20)
    assert expected.document_starts is None
    assert batch.document_starts is not None and batch.document_starts.dtype == torch.bool
    assert torch.equal(batch.tokens, expected.tokens)
    ends = batch.tokens == END
    assert ends.any()
    assert torch.equal(batch.targets == UNCOUNTED, ends)
    assert torch.equal(batch.targets[~ends], expected.targets[~ends])
    assert batch.document_starts[:, 0].all()
    assert torch.equal(batch.document_starts[:, 1:], ends[:, :-1])


def test_a_corpus_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["a" * (LENGTH - 1)])  # and an end-of-text: no target for the last token
    with pytest.raises(UserError, match=r"tiny: 32 tokens are fewer .* lower data\.sequence_length") as error:
        make_loader({"tiny": shards})
    assert "\n" not in str(error.value)
    batch = make_loader({"tiny": write_shards(tmp_path / "more", ["a" * LENGTH])}).batch(0, 1)
    assert (batch.tokens.tolist(), batch.targets[0, -1].item()) == ([[97] * LENGTH], END)


def test_the_order_never_changes(tmp_path: Path) -> None:
    """A run goes on with the same windows under another version."""
    corpora = {name: write_shards(tmp_path / name, [f"{name} {i} " * 20 for i in range(9)]) for name in ("a", "b")}
    number, window = make_loader(corpora, {"a": 3.0, "b": 1.0}, seed=7).places(40, 12)
    assert number.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert window.tolist() == [13, 2, 4, 7, 15, 14, 19, 16, 18, 18, 6, 5]


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("reset", [False, True])
def test_evaluation_counts_each_token_once(shards: Shards, batch: int, reset: bool) -> None:
    batches = list(evaluation_batches(shards, LENGTH, batch, END, reset))
    tokens = torch.cat([each.tokens for each in batches]).flatten()
    targets = torch.cat([each.targets for each in batches]).flatten()
    row = torch.from_numpy(shards.read(0, shards.tokens))
    count = shards.tokens - 1
    assert torch.equal(tokens[: count + 1][: len(row)], row[: len(tokens)])
    assert (tokens[count + 1 :] == END).all()
    assert (targets[count:] == UNCOUNTED).all()
    if reset:
        ends = row[:-1] == END
        assert (targets[:count][ends] == UNCOUNTED).all()
        assert torch.equal(targets[:count][~ends], row[1:][~ends])
        assert all(each.document_starts is not None and each.document_starts[:, 0].all() for each in batches)
    else:
        assert torch.equal(targets[:count], row[1:])
        assert all(each.document_starts is None for each in batches)


def test_evaluation_of_less_than_a_window(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["ab"])
    (batch,) = evaluation_batches(shards, 8, 4, END, False)
    assert batch.tokens.tolist() == [[97, 98, END, END, END, END, END, END], *[[END] * 8] * 3]
    assert batch.targets.tolist() == [[98, END, *[UNCOUNTED] * 6], *[[UNCOUNTED] * 8] * 3]


def test_nothing_to_predict_is_refused_before_a_run(tmp_path: Path) -> None:
    write_foreign(tmp_path / "one", [[1]])
    shards = Shards.open(tmp_path / "one")
    for length in (1, LENGTH):
        with pytest.raises(UserError, match="one: 1 tokens leave nothing to predict: give more text"):
            shards.check_validation(length)
    with pytest.raises(UserError, match="nothing to predict"):
        next(evaluation_batches(shards, LENGTH, 1, END, False))
