"""The command that scores: tasks of EleutherAI's harness from local files, each figure computed again."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml

from moe_mamba.errors import UserError
from moe_mamba.evaluation import harness_tasks
from moe_mamba.evaluation.harness import HarnessModel
from moe_mamba.evaluation.harness_tasks import load_tasks, run_tasks
from moe_mamba.model.generation import generate
from moe_mamba.run.restore import Restored, restore
from tests import ROOT
from tools.convert_to_hf import main as convert
from tools.evaluate import main

DOCUMENTS = [
    {
        "question": f"{n} plus {n % 7} is",
        "choices": [f" {n + n % 7}; twice", f" {n + 9};", f" {2 * n}"],
        "answer": n % 3,
        "text": f"{n} plus {n % 7} is {n + n % 7}.",
    }
    for n in range(12)
]
KINDS: dict[str, dict[str, Any]] = {
    "sums_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "sums_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "sums_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is read from JSON is kept in the test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


@pytest.fixture(scope="module")
def model(plain: Path) -> Restored:
    return restore(plain, torch.device("cpu"))


@pytest.fixture(scope="module")
def tasks(model: Restored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks; of what is to be written, half is what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, document in enumerate(DOCUMENTS):
        tokens = model.tokenizer.encode(document["question"])
        written = model.tokenizer.decode(list(generate(model.model, tokens, 6, temperature=0)))
        document["written"] = written.split(".")[0] if number % 2 else "something else"
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "sums.jsonl")}}
    for name, kind in KINDS.items():
        task = {"task": name, **source, "test_split": "train", "metadata": {"version": 1}, **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: object, **flags: Any) -> dict[str, Any]:
    main(*map(str, arguments), json=True, **flags)
    return json.loads(capsys.readouterr().out)


def log_probability(model: Restored, context: list[int], continuation: list[int]) -> float:
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model.model(tokens[:, :-1]).logits[0, len(context) - 1 :].double()
    return logits.log_softmax(-1).gather(1, tokens[0, len(context) :, None]).sum().item()


def test_figures_are_those_of_the_model(
    plain: Path, model: Restored, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = found(capsys, plain, tasks=f"{tasks}/", batch=5)["results"]
    encode = model.tokenizer.encode
    right, right_by_length, text_loss = [], [], 0.0
    for document in DOCUMENTS:
        choices = document["choices"]
        scores = [log_probability(model, encode(document["question"]), encode(choice)) for choice in choices]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right.append(scores.index(max(scores)) == document["answer"])
        right_by_length.append(by_length.index(max(by_length)) == document["answer"])
        tokens = encode(document["text"])
        text_loss += math.log(257) - log_probability(model, tokens[:1], tokens[1:])
    assert 0 < sum(right) < len(right)
    assert results["sums_choice"]["acc,none"] == pytest.approx(sum(right) / 12)
    assert results["sums_choice"]["acc_norm,none"] == pytest.approx(sum(right_by_length) / 12)
    size = sum(len(document["text"].encode()) for document in DOCUMENTS)
    words = sum(len(document["text"].split()) for document in DOCUMENTS)
    assert results["sums_text"]["bits_per_byte,none"] == pytest.approx(text_loss / size / math.log(2), rel=1e-5)
    assert results["sums_text"]["word_perplexity,none"] == pytest.approx(math.exp(text_loss / words), rel=1e-5)
    assert results["sums_write"]["exact_match,none"] == pytest.approx(0.5)


def test_a_text_costs_what_it_costs_as_input(
    plain: Path, model: Restored, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for its ends: the first token is no target of --input, and the end-of-text none of the harness."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": DOCUMENTS[0]["text"]}) + "\n")
    scores = found(capsys, plain, input=str(tmp_path / "text.jsonl"))
    tokens = model.tokenizer.encode(DOCUMENTS[0]["text"])
    end = log_probability(model, tokens, [model.tokenizer.end_of_text])
    results = found(capsys, plain, tasks=str(tasks / "sums_text.yaml"), limit=1)
    loss = results["results"]["sums_text"]["bits_per_byte,none"] * len(tokens) * math.log(2)
    assert loss - math.log(257) == pytest.approx(scores["loss"] * scores["tokens"] + end, rel=1e-5)
    assert results["n-samples"]["sums_text"] == {"original": 12, "effective": 1}


def test_the_converted_model_gives_the_harness_the_same_figures(
    plain: Path, model: Restored, tasks: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

    convert(str(plain), str(tmp_path / "out"))
    theirs = HFLM(
        pretrained=MoEMambaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"),
        batch_size=4,
        max_length=24,
    )
    # Transformers feeds end-of-text before a text, whether the run began its documents anew or not.
    data = model.config.data.model_copy(update={"reset_at_document": False})
    same = replace(model, config=model.config.model_copy(update={"data": data}))
    ours = HarnessModel(same, batch=4, max_length=24)
    found, expected = (run_tasks(each, load_tasks([f"{tasks}/"]), 0)["results"] for each in (ours, theirs))
    assert found.keys() == expected.keys() == KINDS.keys()
    for name, figures in expected.items():
        for figure, value in figures.items():
            same_value = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert found[name][figure] == same_value, (name, figure)


@pytest.fixture
def few_names(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own thousands of task files take seconds to read: three stand for them."""
    whole = harness_tasks.TaskManager

    def manager(include_path: list[Path] | None = None, include_defaults: bool = True) -> Any:
        paths = [*(include_path or []), *([tasks] if include_defaults else [])]
        return whole(include_path=paths, include_defaults=False)

    monkeypatch.setattr(harness_tasks, "TaskManager", manager)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: pytest.fail("asked the hub"), raising=True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("few_names")
def test_people_get_a_table_and_files_the_whole(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    main(str(plain), tasks="sums_ch*,sums_write", num_fewshot=1, limit=4, output=str(output))
    screen = capsys.readouterr()
    assert "|sums_choice|      1|none  |     1|acc" in screen.out
    assert "the first 4 questions" in screen.out
    assert screen.err == (
        "7 of 16 requests were longer than 32 tokens and lost their start: --sequence_length reads more\n"
    )
    assert json.loads(output.read_text())["n-shot"] == {"sums_choice": 1, "sums_write": 1}


@pytest.mark.usefixtures("few_names")
def test_a_group_is_scored_as_one(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = {"group": "sums", "task": ["sums_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "sums.yaml").write_text(yaml.safe_dump(group))
    main(str(plain), tasks=f"{tmp_path}/group/", limit=2)
    screen = capsys.readouterr().out
    assert "| - sums_choice|" in screen
    assert "|Groups|" in screen


@pytest.mark.usefixtures("few_names")
@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ({}, "give either --input .* or --tasks"),
        ({"input": "builtin", "tasks": "sums_text"}, "give either --input .* or --tasks"),
        ({"input": "builtin", "limit": 3}, "--limit only works with --tasks: leave it out"),
        ({"tasks": "sums_text", "max_documents": 3}, "--max_documents only works with --input: leave it out"),
        ({"tasks": "sums_texd"}, "the harness has no such task; close matches: sums_text"),
        ({"tasks": "zzz"}, "the harness has no such task: give one that it has, or a task file"),
        ({"tasks": "none.yaml"}, "no such task file or folder of task files"),
        ({"tasks": ","}, "--tasks=, names no task"),
        ({"tasks": "sums_text", "output": "no/such/folder.json"}, "no/such/folder.json cannot be written"),
    ],
)
def test_wrong_flags_are_one_line(plain: Path, flags: dict[str, Any], refusal: str) -> None:
    with pytest.raises(UserError, match=refusal) as error:
        main(str(plain), **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (
            {"dataset_path": "somebody/something"},
            r"faulty.yaml: the task cannot be loaded .*the Hugging Face hub cannot be reached: fix the network, or",
        ),
        (
            {"dataset_kwargs": {"data_files": "none.jsonl"}},
            r"faulty.yaml: the task cannot be loaded .*none.jsonl.*: fix the task's file, its data or",
        ),
        (
            {"doc_to_text": "{{questions.first.second}}"},
            r"faulty.yaml: the task cannot be loaded .*'questions' is undefined",
        ),
        ({"task": None}, r"faulty.yaml: the task cannot be loaded .*Unknown config shape"),
        ({"unsafe_code": True}, "faulty runs code that a model writes"),
    ],
)
def test_faulty_tasks_are_one_line(
    plain: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], refusal: str
) -> None:
    def no_network() -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", no_network)
    task = yaml.safe_load((tasks / "sums_choice.yaml").read_text()) | {"task": "faulty"} | change
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump({key: value for key, value in task.items() if value}))
    with pytest.raises(UserError, match=refusal) as error:
        main(str(plain), tasks=str(tmp_path / "faulty.yaml"))
    assert "\n" not in str(error.value)
    assert not datasets.config.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE")


def test_without_the_harness_the_extra_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "moe_mamba.evaluation.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--tasks needs EleutherAI's harness.*: pip install -e '.\[evaluation\]'"):
        main(str(plain), tasks="hellaswag")


@pytest.mark.slow
def test_the_command_runs_and_prints_nothing_else(plain: Path, tasks: Path, tmp_path: Path) -> None:
    """The task's own code imports the package ``evaluate``, as some of the harness's do, and not the tool so named."""
    (tmp_path / "metrics.py").write_text(
        "import evaluate\n\ndef text(doc):\n    return evaluate.load and doc['question']\n"
    )
    task = (tasks / "sums_choice.yaml").read_text()
    assert "doc_to_text: " in task
    lines = ["doc_to_text: !function metrics.text" if "doc_to_text" in line else line for line in task.splitlines()]
    (tmp_path / "sums_choice.yaml").write_text("\n".join(lines))
    command = [sys.executable, "tools/evaluate.py", f"--checkpoint={plain}", f"--tasks={tmp_path}/sums_choice.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["results"].keys() == {"sums_choice"}
