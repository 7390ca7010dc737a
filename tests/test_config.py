import subprocess
import sys
from pathlib import Path

import pytest

from moe_mamba.config import Config
from moe_mamba.config_file import changed_on_resume, keys, load_config, reference, save_config
from moe_mamba.config_model import InnerConfig
from moe_mamba.errors import UserError
from tests import ROOT

BRACKETS = ["(M)", "()", "M)", "(ME", "((ME))", "M(E"]


@pytest.mark.parametrize("pattern", ["*-", "*E", "M", "M-", "ME", "MEM*-E", "-", "E", "(ME)", "(*E)-", "*(M-)"])
def test_a_pattern_is_text_whatever_yaml_makes_of_it(tmp_path: Path, pattern: str) -> None:
    file = tmp_path / "config.yaml"
    for written in (pattern, f"'{pattern}'", f'"{pattern}"  # with a comment'):
        file.write_text(f"model:\n  pattern: {written}\n  d_model: 64\n")
        assert load_config(file).model.pattern == pattern


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  pattern: M\n", encoding="utf-8-sig")
    assert load_config(tmp_path / "config.yaml").model.pattern == "M"


def test_a_number_for_a_pattern_is_read_as_its_letter(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  pattern: 2\n")
    with pytest.raises(UserError, match="unknown letter '2'"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="unknown letter '2'"):
        load_config(None, {"model.pattern": 2})


def test_the_saved_config_reproduces_the_run(tmp_path: Path) -> None:
    config = load_config(
        None,
        {
            "model.pattern": "M*-",
            "train.steps": "null",
            "train.tokens": "1000000",
            "data.train": '{"a.jsonl": 0.7, "b.jsonl": 0.3}',
            "data.validation": '{"c4": "c.jsonl", "wiki": "d.jsonl"}',
            "moe.capacity_factor": "none",
            "moe.inner.projections": "gate, out",
            "moe.inner.balance": "none",
            "moe.inner.top_k": "null",
            "train.learning_rate": "3e-4",
            "parallel.zero": "2",
        },
    )
    assert config.data.train_weights == {"a.jsonl": 0.7, "b.jsonl": 0.3}
    assert config.data.validation_sets == {"c4": "c.jsonl", "wiki": "d.jsonl"}
    assert config.moe.capacity_factor is None
    assert (config.moe.inner.balance, config.moe.inner.top_k) == ("none", None)
    assert config.moe.inner.projections == ["gate", "out"]
    assert config.steps == 1000000 // (64 * 256)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_section_inside_a_section_may_be_empty_and_none_is_no_projection(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("moe:\n  experts: 4\n  inner:\n")
    assert load_config(tmp_path / "config.yaml").moe.inner == InnerConfig()
    assert load_config(tmp_path / "config.yaml", {"moe.inner.projections": "none"}).moe.inner == InnerConfig()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  d_model: 64\ntrain:\n  steps: 5\n")
    config = load_config(tmp_path / "config.yaml", {"model.d_model": 32, "data.train": "a.txt,b.txt"})
    assert (config.model.d_model, config.train.steps, config.data.train) == (32, 5, ["a.txt", "b.txt"])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.d_mode": 64}, ["model.d_mode", "did you mean model.d_model"]),
        ({"modle.d_model": 64}, ["modle"]),
        ({"model.d-model": 64}, ["unknown key model.d-model"]),
        ({"d_model": 64}, ["d_model", "did you mean model.d_model"]),
        ({"model.d_model": "wide"}, ["model.d_model='wide'", "integer"]),
        ({"model.d_model": -1}, ["model.d_model=-1"]),
        ({"model.pattern": "MX"}, ["model.pattern=MX", "'X'", "M Mamba"]),
        ({"model.pattern": ""}, ["model.pattern is empty"]),
        *(({"model.pattern": pattern}, [f"model.pattern={pattern}", "write (ME)"]) for pattern in BRACKETS),
        ({"moe.inner.projections": "gate,gate"}, ["moe.inner.projections=gate,gate", "twice"]),
        ({"moe.inner.projections": "in"}, ["moe.inner.projections", "'in'", "conv"]),
        ({"moe.inner.projection": "gate"}, ["moe.inner.projection", "did you mean moe.inner.projections"]),
        ({"moe.inner": "gate"}, ["moe.inner='gate'", "section"]),
        ({"moe.inner.experts": 64}, ["moe.inner.experts=64 without moe.inner.projections"]),
        ({"moe.inner.router": "shared"}, ["moe.inner.router=shared without moe.inner.projections"]),
        ({"moe.inner.projections": "gate", "moe.inner.d_expert": 9}, ["moe.inner.d_expert=9", "expert=switch"]),
        ({"moe.experts.inner": 4}, ["moe.experts=", "integer"]),
        ({"moe.inner.router": "shared", "moe.inner.projections": "conv"}, ["moe.inner.router=shared", "add out"]),
        ({"moe.inner.projections": "gate", "moe.inner.top_k": 3, "moe.inner.experts": 2}, ["moe.inner.top_k=3"]),
        ({"moe.inner.projections": "gate", "model.pattern": "*E"}, ["moe.inner.projections=gate", "*E"]),
        ({"moe.inner.projections": "gate", "moe.inner.every": 9}, ["moe.inner.every=9", "8 Mamba layers"]),
        (
            {"moe.inner.projections": "gate", "model.pattern": "M", "parallel.zero": 3},
            ["parallel.zero=3", "model.pattern=M and moe.inner.projections=gate", "parallel.zero=2"],
        ),
        ({"model.pattern": "*-", "model.d_model": 100, "model.heads": 8}, ["model.d_model=100", "model.heads=8"]),
        ({"model.pattern": "*-", "model.heads": 8, "model.kv_heads": 3}, ["model.kv_heads=3"]),
        ({"model.pattern": "*-", "model.d_model": 24, "model.heads": 8}, ["odd", "model.positions=none"]),
        ({"model.pattern": "*-", "model.head_dim": 5}, ["model.head_dim = 5 is odd"]),
        ({"model.pattern": "*-", "model.sliding_window": 0}, ["model.sliding_window=0"]),
        ({"model.pattern": "*-", "model.rope_type": "yarn"}, ["model.rope_type='yarn'", "linear"]),
        ({"model.pattern": "*-", "model.rope_factor": 2}, ["model.rope_factor=2", "model.rope_type=linear"]),
        ({"model.pattern": "*", "model.rope_type": "linear", "model.positions": "none"}, ["model.rope_type=default"]),
        (
            {"model.pattern": "*-", "model.rope_type": "llama3", "model.rope_low_freq_factor": 4},
            ["model.rope_low_freq_factor=4 is not below", "model.rope_high_freq_factor=4"],
        ),
        ({"model.expand": 3, "model.d_inner": 341}, ["model.expand=3 with model.d_inner=341", "leave one of them out"]),
        ({"moe.top_k": 2}, ["moe.top_k=2", "moe.router=top_k"]),
        ({"moe.top_k": 64, "moe.router": "top_k"}, ["moe.top_k=64", "moe.experts=32"]),
        ({"moe.router": "top_k", "moe.renormalize": "true"}, ["moe.renormalize", "no gradient"]),
        ({"moe.router": "expert_choice", "moe.capacity_factor": "null"}, ["moe.capacity_factor=null"]),
        ({"moe.router": "expert_choice", "moe.balance": "bias"}, ["moe.balance=bias"]),
        ({"moe.router": "best"}, ["moe.router='best'", "switch"]),
        ({"train.precision": "bf16", "parallel.zero": 0}, ["train.precision=bf16", "parallel.zero=1"]),
        ({"parallel.zero": 4}, ["parallel.zero=4", "0, 1, 2 or 3"]),
        ({"parallel.zero": 3}, ["parallel.zero=3", "model.pattern=ME", "parallel.zero=2"]),
        ({"parallel.zero": 0, "parallel.offload_optimizer": True}, ["parallel.offload_optimizer", "parallel.zero=1"]),
        ({"parallel.tensor": 0}, ["parallel.tensor=0"]),
        ({"parallel.pipeline": 2}, ["parallel.pipeline=2", "set parallel.pipeline=1"]),
        ({"parallel.context": 2}, ["parallel.context=2", "set parallel.context=1"]),
        ({"parallel.expert_tensor": True}, ["parallel.expert_tensor=true", "parallel.tensor to 2"]),
        ({"parallel.expert": 2, "model.pattern": "M-"}, ["parallel.expert=2", "model.pattern=M-", "parallel.expert=1"]),
        ({"train.global_batch": 10, "train.micro_batch": 4}, ["train.global_batch=10", "train.micro_batch=4"]),
        ({"train.tokens": 100}, ["train.steps", "train.tokens"]),
        ({"data.train": "[1"}, ["data.train", "JSON"]),
        ({"data.train": ""}, ["data.train is empty"]),
        ({"data.train": '{"a": -1}'}, ["data.train", "-1"]),
        ({"data.train": '{"a": 1, "a": 2}'}, ["data.train", "'a' is named twice"]),
        ({"data.train": "a,a"}, ["data.train", "'a' is named twice"]),
        ({"data.validation": "a.b,a_b"}, ["data.validation: 'a.b' and 'a_b'", "'a_b'", "give names"]),
        ({"model.repeat": 4096}, ["model.pattern has 2 letters", "model.repeat=4,096", "at most 4,096"]),
        ({"train.steps": 10**9, "train.global_batch": 2**20}, ["train.steps", "train.global_batch=1,048,576"]),
        ({"train.beta2": 1}, ["train.beta2=1", "from 0 to below 1"]),
        ({"parallel.zero": True}, ["parallel.zero=True", "give an integer"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overrides: dict, named: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(None, overrides)
    line = str(refusal.value)
    assert "\n" not in line
    for part in named:
        assert part in line


@pytest.mark.parametrize("text", ["model: [", "- a list", "model: 3", "\udcff".encode("utf-8", "surrogateescape")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_config(file)


def test_yaml_is_text_that_each_key_reads(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "run:\n  folder: 2026-01-01\n  seed: 010\ndata:\n  tokenizer: 1:30\n  cache: 1e-3\n  train: {a: 1e-3, b: 2}\n"
        "train:\n  tokens: 1e9\n  steps:\n  learning_rate: 1e-3\n  compile: no\nlogging: {wandb: ~, plots: yes}\n"
    )
    config = load_config(tmp_path / "config.yaml")
    assert (config.run.folder, config.run.seed, config.data.tokenizer) == ("2026-01-01", 10, "1:30")
    assert (config.data.cache, config.data.train) == ("1e-3", {"a": 1e-3, "b": 2.0})
    assert (config.train.tokens, config.train.steps, config.train.learning_rate) == (10**9, None, 1e-3)
    assert (config.train.compile, config.logging.wandb, config.logging.plots) == (False, None, True)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", "line 3: 'steps' stands here twice"),
        ("model:\n  d_model: 64\nmodel:\n  repeat: 2\n", "line 3: 'model' stands here twice"),
        ("run:\n  folder: &a x\ndata:\n  cache: *a\n", "line 4: \\*a is an alias"),
        ("run:\n  folder: !!str x\n", "line 2: the tag"),
        ("run: {}\n---\nrun: {}\n", "line 2: a second document"),
        ("run:\n  [a, b]: x\n", "line 2: a key is a word"),
        ("run:\n\tfolder: x\n", "line 2: not YAML"),
    ],
)
def test_what_yaml_would_pass_over_in_silence_is_refused_with_its_line(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        load_config(tmp_path / "config.yaml")


def test_no_number_is_looked_at_with_torch() -> None:
    code = (
        "import sys; from moe_mamba.commands import train; from moe_mamba.errors import UserError\n"
        "try: train.main(**{'train.steps': 0})\n"
        "except UserError: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_the_reference_lists_every_key_with_default_and_meaning() -> None:
    text = reference()
    for section, field in Config.model_fields.items():
        for name in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"--{section}.{name}=" in text or (section, name) == ("moe", "inner")
    for name in InnerConfig.model_fields:
        assert f"--moe.inner.{name}=" in text
    assert all(meaning and "None" not in meaning for _, _, meaning in keys())


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("model.d_model", 64, True),
        ("moe.experts", 4, True),
        ("moe.inner.projections", "gate", True),
        ("data.tokenizer", "bytes", True),
        ("data.sequence_length", 32, True),
        ("run.seed", 1, True),
        ("train.global_batch", 32, True),
        ("train.steps", 9, False),
        ("train.learning_rate", 1e-4, False),
        ("train.micro_batch", 8, False),
        ("parallel.zero", 2, False),
        ("parallel.tensor", 2, False),
        ("parallel.expert", 4, False),
        ("logging.tensorboard", True, False),
        ("checkpoint.every", 7, False),
    ],
)
def test_what_a_resumed_run_may_change(key: str, value: object, is_refused: bool) -> None:
    changed = changed_on_resume(load_config(), load_config(None, {key: value}))
    assert [name for name, _, _ in changed] == ([key] if is_refused else [])


def test_a_config_that_ships_is_found_by_its_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.yaml") == load_config(ROOT / "configs" / "demo.yaml")
    with pytest.raises(UserError, match=r"config file configs/demon\.yaml cannot be read"):
        load_config("configs/demon.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("model: {d_model: 64}\n")
    assert load_config("configs/demo.yaml").model.d_model == 64, "the user's own file comes first"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it alone behind `=`, and YAML does."""
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "a.yaml").write_text("data: {cache: ~/cache, train: [~/a.jsonl, builtin]}\n")
    config = load_config(tmp_path / "a.yaml", {"run.folder": "~/runs/x", "train.warm_start": "~/runs/y"})
    assert config.data.cache == "/home/someone/cache"
    assert config.data.train == ["/home/someone/a.jsonl", "builtin"]
    assert (config.run.folder, config.train.warm_start) == ("/home/someone/runs/x", "/home/someone/runs/y")
