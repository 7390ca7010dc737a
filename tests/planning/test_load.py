import json
import random
from pathlib import Path

import pytest

from moe_mamba.errors import UserError
from moe_mamba.planning.load import Load, Travel, fullest_rank


def test_even_is_as_equal_as_integers_allow() -> None:
    matrix = Load.parse("even").matrix(ranks=3, experts=6, rows_per_rank=20)
    assert [sum(row) for row in matrix] == [20, 20, 20]
    assert {rows for row in matrix for rows in row} == {3, 4}
    assert [sum(column) for column in zip(*matrix, strict=True)] == [10] * 6


def test_skewed_gives_the_first_expert_a_multiple_of_the_mean() -> None:
    matrix = Load.parse("skewed:1.5").matrix(ranks=4, experts=8, rows_per_rank=1000)
    columns = [sum(column) for column in zip(*matrix, strict=True)]
    assert columns[0] == 1.5 * 4000 / 8
    assert max(columns[1:]) - min(columns[1:]) <= 1
    assert fullest_rank(matrix) == 0
    assert Load.parse("skewed:1").matrix(2, 4, 7) == Load.parse("even").matrix(2, 4, 7)
    assert Load.parse("skewed:1").matrix(2, 1, 7) == [[7], [7]]


@pytest.mark.parametrize("seed", range(50))
def test_rows_are_exact_and_columns_nearly(seed: int) -> None:
    chance = random.Random(seed)
    ranks, experts, rows = chance.randint(1, 9), chance.randint(1, 70), chance.randint(0, 200)
    factor = chance.choice((1.0, 1.3, float(min(3, experts))))
    shares = [factor / experts] + [(1 - factor / experts) / max(1, experts - 1)] * (experts - 1)
    matrix = Load.parse(f"skewed:{min(factor, experts)}").matrix(ranks, experts, rows)
    assert len(matrix) == ranks
    for row in matrix:
        assert sum(row) == rows
        assert min(row) >= 0
    for share, column in zip(shares, zip(*matrix, strict=True), strict=True):
        assert abs(sum(column) - (rows * ranks if experts == 1 else share * rows * ranks)) < 1.5


def _run(folder: Path, *loads: object) -> str:
    lines = [
        {"step": step, "loss": 1.0} | ({} if load is None else {"expert_load": load}) for step, load in enumerate(loads)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"run:{folder}"


def test_a_runs_newest_load_of_each_router(tmp_path: Path) -> None:
    text = _run(tmp_path, {"1": [1.0, 0.0], "3.in": [0.5, 0.5]}, {"1": [0.75, 0.25], "3.in": [0.25, 0.75]}, None)
    load = Load.parse(text)
    assert load.matrix(2, 2, 8, "layers.1.mixer.router") == [[6, 2], [6, 2]]
    assert load.matrix(1, 2, 8, "layers.3.mixer.in.router") == [[2, 6]]
    assert load.matrix(1, 2, 8) == [[4, 4]]  # the mean of both
    with pytest.raises(UserError, match="no load of router 5 with 2 experts, only of 1 "):
        load.matrix(1, 2, 8, "layers.5.mixer.router")
    with pytest.raises(UserError, match="no load of router 1 with 4 experts"):
        load.matrix(1, 4, 8, "layers.1.mixer.router")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("uneven", "is not known: give even, skewed"),
        ("skewed", "is no number"),
        ("skewed:much", "much is no number"),
        ("skewed:1/0", "is no number"),
        ("skewed:0.5", "at least the mean"),
        ("skewed:nan", "is no number"),
        ("skewed:1e999999999", "is no number such as 1.5"),
        ("skewed:2000000", "no more than 1,000,000 times the mean"),
        ("run:", "is not known"),
        ("run:nowhere", "does not exist"),
    ],
)
def test_wrong_loads_are_refused(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Load.parse(text)


@pytest.mark.parametrize("load", [None, [], {"1": [0.5, 0.1]}, {"1": ["0.5", 0.5]}, {"1": [2, -1]}])
def test_runs_without_shares_are_refused(tmp_path: Path, load: object) -> None:
    with pytest.raises(UserError, match=r"no load of experts|no list of shares"):
        Load.parse(_run(tmp_path, load))


def test_a_factor_beyond_the_number_of_experts_is_refused() -> None:
    with pytest.raises(UserError, match="4 experts have at most 4 times the mean"):
        Load.parse("skewed:5").matrix(2, 4, 8)


def test_what_a_rank_sends_another_receives() -> None:
    matrix = Load.parse("skewed:2").matrix(ranks=2, experts=4, rows_per_rank=9)
    first, second = (Travel.of(matrix, rank) for rank in range(2))
    assert [first.sent_splits[1], second.sent_splits[0]] == [second.received_splits[0], first.received_splits[1]]
    assert sum(first.sent_splits) == sum(second.sent_splits) == 9
    assert sum(first.counts) == sum(first.received_splits)
    assert first.counts == [matrix[0][0] + matrix[1][0], matrix[0][1] + matrix[1][1]]
