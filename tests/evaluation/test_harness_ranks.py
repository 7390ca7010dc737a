"""EleutherAI's harness on several ranks: rank 0 asks, and what all answer is what one process would."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from moe_mamba.errors import UserError
from moe_mamba.evaluation.harness import HarnessModel
from moe_mamba.evaluation.harness_ranks import ShardedHarnessModel, harness_model
from moe_mamba.run.inference import joined, restore_in_layout
from moe_mamba.run.restore import Restored, restore
from tests.evaluation.test_harness import PAIRS
from tests.hf.checkpoints import make_run
from tests.parallel.output import printed

SETTINGS = {"until": ["e"], "max_gen_toks": 5, "do_sample": False}


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers(model: HarnessModel) -> dict[str, Any]:
    return {
        "scores": model.loglikelihood(requests("loglikelihood", PAIRS)),
        "texts": model.loglikelihood_rolling(requests("loglikelihood_rolling", [("one two three four five",), ("",)])),
        "written": model.generate_until(
            requests("generate_until", [(context, SETTINGS) for context in ("a", "b c", "one two three")])
        ),
        "counts": (model.asked, model.truncated),
    }


def build(restored: Restored) -> HarnessModel:
    return harness_model(restored, batch=2, max_length=16)


def answers_on_a_rank(folder: Path, layout: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """In a worker: what is answered, and the line of a refusal that only rank 0 meets."""
    with joined() as world:
        model = build(restore_in_layout(folder, layout, world))
        assert isinstance(model, ShardedHarnessModel)
        answered = model.lead(lambda: answers(model))

        def refuse() -> None:
            model.generate_until(requests("generate_until", [("a", SETTINGS | {"num_beams": 3})]))

        with pytest.raises(UserError) as error:
            model.lead(refuse)
        return answered, str(error.value)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"expert": 2}),
        pytest.param(4, {"tensor": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "expert": 2, "expert_tensor": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_harness_is_told_the_same(world: Any, tmp_path: Path, ranks: int, layout: dict[str, Any]) -> None:
    make_run(tmp_path, {"pattern": "M*E"})
    expected = answers(build(restore(tmp_path, torch.device("cpu"))))
    (found, refusal), *others = world.run(answers_on_a_rank, tmp_path, layout, ranks=ranks)
    for mine, one in zip(found["scores"], expected["scores"], strict=True):
        assert mine.log_probability == pytest.approx(one.log_probability, abs=1e-4) and mine.is_greedy == one.is_greedy
    assert found["texts"] == pytest.approx(expected["texts"], abs=1e-4)
    assert (found["written"], found["counts"]) == (expected["written"], expected["counts"])
    assert refusal.startswith("generation_kwargs: num_beams is unknown")
    assert others == [(None, refusal)] * (ranks - 1)


@pytest.mark.slow
def test_the_command_prints_once_what_one_process_prints(world: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"pattern": "ME"})
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} plus 1 is {n + 1}."}) + "\n" for n in range(9))
    )
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "sums.jsonl")},
        "test_split": "train",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    flags = {"tasks": str(tmp_path / "sums.yaml"), "json": True}
    layout = {"parallel.tensor": 2, "parallel.expert": 2}
    first, second = world.run(printed, "evaluate", str(tmp_path / "run"), **flags, **layout)
    (expected, *_) = world.run(printed, "evaluate", str(tmp_path / "run"), ranks=1, **flags)
    assert second == ""
    mine, one = (json.loads(text)["results"]["sums"]["bits_per_byte,none"] for text in (first, expected))
    assert mine == pytest.approx(one, rel=1e-5)
