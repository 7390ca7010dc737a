"""The tables that ship: every row can be made, with the parameters and figures that it is to have; what is refused."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_mamba.commands.reproduce import main
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.reproduce.experiment import FOLDER, SCALES, Table, read_experiment, read_table, tables
from moe_mamba.reproduce.runs import Workspace
from moe_mamba.reproduce.text import Asked, Facts, expected_text, name_of, prepare_text

VERSIONS = {name: list(read_experiment(FOLDER / f"{name}.yaml").versions) for name in tables()}
ALL = [
    pytest.param(name, version, scale, id=f"{name}-{version}-{scale}")
    for name, versions in VERSIONS.items()
    for version in versions
    for scale in SCALES
    if (version, scale) != ("ours", "paper")
]
MINI_MAMBA = 261_120  # active parameters, without embedding, head and norms


def test_every_table_of_the_paper_is_here() -> None:
    assert VERSIONS == {
        "designs": ["v2"],
        "experts": ["v1", "v2"],
        "inner": ["v2"],
        "lr": ["v1"],
        "main": ["v1", "v2"],
        "parallel": ["v2"],
        "ratio": ["v2"],
        "rates": ["ours"],  # and what is beyond it
        "resets": ["ours"],
        "routers": ["ours"],
    }


@pytest.mark.parametrize(("name", "version", "scale"), ALL)
def test_every_row_can_be_made(name: str, version: str, scale: str) -> None:
    table = read_table(name, version, scale)
    assert table.published.reference in table.rows
    for row in table.rows:
        assert table.reference_of(row) in table.rows, row
        config = table.config(row, {})
        assert config.data.sequence_length * config.train.global_batch * config.steps > 0


@pytest.mark.parametrize("name", VERSIONS)
def test_active_parameters_of_mini_scale_are_near_one_another(name: str) -> None:
    table = read_table(name, None, "mini")
    found = {}
    for row in table.rows if name != "lr" else ["rate_1"]:  # all its rows are one model
        config = table.config(row, {})
        found[row] = LanguageModel.on_meta(config.model, config.moe).parameter_counts()["active"]
    bound = 0.02 if name in ("inner", "ratio", "designs") else 0.001  # the paper's own are 7 % apart
    assert all(abs(count / MINI_MAMBA - 1) <= bound for count in found.values()), found


@pytest.mark.parametrize(("version", "scale", "steps"), [("v1", "paper", 100_000), ("v2", "paper", 150_000)])
def test_the_papers_scale_is_the_papers(version: str, scale: str, steps: int) -> None:
    table = read_table("main", version, scale)
    config = table.config("moe_mamba", {})
    assert (config.steps, config.moe.experts) == (steps, 32 if version == "v1" else 42)
    assert list(config.data.train_weights) == ["hf:allenai/c4:en:train"]
    experts = read_table("experts", version, scale)
    per_step = config.data.sequence_length * config.train.global_batch
    assert experts.config("moe_mamba", {}).moe.experts == 16
    assert experts.config("mamba", {}).steps == (steps if version == "v1" else 10**9 // per_step)


def test_rows_that_two_tables_share_are_the_same() -> None:
    made: dict[str, tuple[str, object]] = {}
    for name in VERSIONS:
        table = read_table(name, None, "mini")
        for row in table.rows:
            other, config = made.setdefault(row, (name, table.config(row, {})))
            assert config == table.config(row, {}), f"{row} of {other} and of {name}"


def test_dry_at_the_papers_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(table="main", version="v1", scale="paper", dry=True, only="moe_mamba", output=str(tmp_path / "out"))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "moe_mamba" in line]
    assert "| 416,342,016 | 26,271,744 | 6,553,600,000 |" in row
    hours = [float(cell) for cell in row.split("|")[-3:-1]]
    assert hours[0] > hours[1] > 0
    assert not (tmp_path / "out").exists()


def test_a_row_takes_the_rate_of_another_and_shares_its_sweep(tmp_path: Path) -> None:
    workspace = Workspace(read_table("experts", "v1", "mini"), tmp_path, None, 4096 * 100)
    runs = workspace.sweep(["experts_1", "experts_4", "mamba"])
    assert [run.name for run in runs if run.row == "moe_mamba"] == [
        f"sweep/moe_mamba/rate{rate}" for rate in ("0.0005", "0.001", "0.002", "0.004", "0.008", "0.016", "0.032")
    ]
    assert {run.row for run in runs} == {"moe_mamba", "mamba"}
    assert {(run.config.steps, run.config.run.seed, run.state) for run in runs} == {(15, 1000, "new")}
    assert workspace.rate("experts_1") is None
    assert workspace.runs("experts_1", [1]) == []  # before the sweep nobody knows its rate


def test_a_row_whose_rate_is_given_has_no_sweep_and_the_folder_of_its_name(tmp_path: Path) -> None:
    workspace = Workspace(read_table("rates", None, "mini"), tmp_path, None, 4096 * 100)
    assert {run.row for run in workspace.sweep(["mamba", "mamba_low"])} == {"mamba"}
    (run,) = workspace.runs("mamba_low", [1])
    assert (run.name, run.config.train.learning_rate) == ("runs/mamba_low/seed1", 0.005)
    assert (workspace.rate("mamba_low"), workspace.rate("mamba"), workspace.swept("mamba_low")) == (0.005, None, {})


def test_an_early_look_has_fewer_tokens_and_folders_of_its_own(tmp_path: Path) -> None:
    long, short = (Workspace(read_table(name, None, "mini"), tmp_path, None, 4096 * 100) for name in ("main", "resets"))
    assert [run.name for run in short.sweep(["mamba"])] == [run.name for run in long.sweep(["mamba"])]
    assert {run.config.steps for run in short.sweep(["mamba"])} == {15}
    assert (long.planned("mamba").name, long.planned("mamba").config.steps) == ("runs/mamba/seed1", 100)
    assert (short.planned("mamba").name, short.planned("mamba").config.steps) == ("runs_50/mamba/seed1", 50)


def test_what_is_public_of_a_text_names_no_folder_and_loses_no_file() -> None:
    facts = Facts(
        asked={"train": "/home/me/a/text.jsonl,/home/me/b/text.jsonl", "tokenizer": "/home/me/words"},
        train=["/home/me/a/text.jsonl", "/home/me/b/text.jsonl", "hf:allenai/c4:en:train"],
        validation="/home/me/c.jsonl",
        tokenizer="/home/me/out/tokenizer",
        vocab_size=300,
        sha256={"/home/me/a/text.jsonl": "1", "/home/me/b/text.jsonl": "2", "builtin:validation": "3"},
        tokens=[10, 20],
        documents=[],
        split="as it was given",
        vocabulary="/home/me/words",
    )
    public = facts.public()
    assert public["sha256"] == {"text.jsonl": "1", "text.jsonl (2)": "2", "builtin:validation": "3"}
    assert public["vocabulary"] == "words"
    assert name_of("hf:allenai/c4:en:train") == "hf:allenai/c4:en:train"


@pytest.mark.parametrize(("tokenizer", "words"), [("", 300), ("sentencepiece", 300), ("bytes", 257)])
def test_the_vocabulary_is_known_before_the_text_is_prepared(tmp_path: Path, tokenizer: str, words: int) -> None:
    words_of = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    texts = [f"{first} and {second} are numbers" for first in words_of for second in words_of]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = Asked(train=str(tmp_path / "text.jsonl"), tokenizer=tokenizer)
    expected = expected_text(asked, 300)
    made = prepare_text(tmp_path / "out", asked, 300, lambda line: None)
    assert (expected.vocab_size, expected.vocabulary) == (made.vocab_size, made.vocabulary)
    assert made.vocab_size == words


def test_two_calls_at_once_prepare_one_text(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} is {n}."}) + "\n" for n in range(5000)))
    asked = Asked(train=str(tmp_path / "text.jsonl"), tokenizer="bytes")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(prepare_text, tmp_path / "out", asked, 257, lambda line: None) for _ in range(2)]
        first, second = (call.result() for call in calls)
    assert first == second
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert [len(lines), json.loads(lines[-1])["text"]] == [4900, "4998 is 4998."]


def test_only_expert_choice_looks_ahead_and_so_compares_with_nothing() -> None:
    table = read_table("routers", None, "mini")
    configs = {row: table.config(row, {}).moe for row in table.rows}
    not_causal = {row for row, moe in configs.items() if moe.router == "expert_choice"}
    assert not_causal == {row for row in table.rows if not table.rows[row].compares} == {"expert_choice"}
    made = {(moe.scores, moe.balance, moe.capacity_factor) for row, moe in configs.items() if row not in not_causal}
    assert made == {(*kind, c) for kind in (("softmax", "loss"), ("sigmoid", "bias")) for c in (None, 1.25, 1.0)}
    assert {moe.evaluation_capacity for moe in configs.values()} == {None}  # validation drops no token


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--table=six"], ["--table=six", "designs, experts"]),
        (["--table=routers", "--version=v2"], ["of this table there is ours"]),
        (["--table=routers", "--scale=paper"], ["no --scale=paper"]),
        (["--table=lr", "--version=v2"], ["of this table there is v1"]),
        (["--table=main", "--version=v3"], ["v1 or v2"]),
        (["--table=main", "--scale=huge"], ["--scale=huge", "mini, paper"]),
        (["--table=main", "--only=mamba,jamba"], ["--only=jamba", "moe_mamba"]),
        (["--table=main", "--only=,"], ["--only is empty"]),
        (["--table=main", "--seeds=0"], ["seeds"]),
        (["--table=main", "--model.d_model=8"], ["--model.d_model", "configs/reproduce"]),
        (["--table=main", "--dry", "--gather"], ["--dry and --gather"]),
        (["--table=main", "--scale=paper", "--data.train=a.jsonl"], ["--data.train", "mini"]),
        (["--table=main", "--gather"], ["no runs"]),
        (["--table=main", "--dry", "--archive=a.tar.xz"], ["--archive with --dry"]),
        (["--table=main", "--gather", "--archive=a.zip"], ["--archive=a.zip", ".tar.xz"]),
        (["--table=main", "--gather", "--archive=none/a.tar.xz"], ["no folder none"]),
        (["--table=main", "--output="], ["--output is empty"]),
        (["--table=main", "--jobs="], ["--jobs is empty"]),
        (["--table=main", "--slurm="], ["--slurm is empty"]),
        (["--table=main", "--gather", "--archive="], ["--archive is empty"]),
        (["--table=main", "--data.train=none.jsonl"], ["none.jsonl"]),
        (["--table=main", "--data.train=none.jsonl", "--dry"], ["none.jsonl"]),
        (["--table=main", "--data.validation=none.jsonl", "--dry"], ["none.jsonl"]),
        (["--table=main", "--data.tokenizer=none.model", "--dry"], ["none.model"]),
    ],
)
def test_refusals(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(main, *flags)
    for part in named:
        assert part in line


TINY = """
title: Tiny
rows: {a: {title: A}, b: {title: B}}
mini: {config: configs/mini.yaml, runs: {a: {}, b: {}}}
versions: {v1: {source: nowhere, reference: a, published: {a: {loss: 3.5}}}}
"""


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("title: Tiny", "titel: Tiny", "titel"),
        ("a: {title: A}", "a: {title: A, at: soon}", "rows.a.at='soon'"),
        ("a: {title: A}", "a: {title: A, reference: c}", "'c' is no row"),
        ("reference: a", "reference: c", "'c' is no row"),
        ("runs: {a: {}, b: {}}", "runs: {c: {}}", "'c' is no row"),
        ("b: {}}", "b: {rate_of: c}}", "'c' is no row"),
        ("config: configs/mini.yaml, ", "", "mini.runs.a has no config"),
        ("v1: {", "v7: {", "versions.v7"),
        ("runs: {a: {}, b: {}}", "runs: {a: {rate_of: b}, b: {rate_of: a}}", "has no rate of its own"),
        ("b: {}}", "b: {rate_of: a, rate: 8.e-3}}", "rate and rate_of"),
        ("b: {}}", "b: {rate: 0}}", "mini.runs.b.rate='0'"),
        ("mini: {", "mini: {sweep: {rates: []}, ", "rates"),
        ("mini: {", "mini: {sweep: {rates: [8.e-3, 8.e-3]}, ", "the same"),
        ("mini: {", "mini: {sweep: {rates: [8.e-3], seed: 1}, ", "is a seed of the table's runs"),
        ("loss: 3.5", "loss: 3.5, perplexity: 3", "perplexity"),
        ("source: nowhere, ", "", "versions.v1.source is missing"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, before: str, after: str, named: str) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    table = Table("tiny", "v1", "mini", read_experiment(file))
    assert list(table.rows) == ["a", "b"]
    with pytest.raises(UserError, match="no --scale=paper"):
        Table("tiny", "v1", "paper", read_experiment(file))
    assert before in TINY
    file.write_text(TINY.replace(before, after))
    with pytest.raises(UserError) as error:
        read_experiment(file)
    assert named in str(error.value)
