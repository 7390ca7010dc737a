"""The command that looks into checkpoints: what it lists, and that it names any damage."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.checkpoint.inspection import inspect, inspect_tensor
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError
from tests.train.runs import save_as_before
from tools.inspect_checkpoint import main

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 4.0]])


@pytest.fixture
def step(tmp_path: Path) -> Path:
    shards = [
        Shard("weights/w", (2, 2), (0, 0), WEIGHT[:1]),
        Shard("weights/w", (2, 2), (1, 0), WEIGHT[1:]),
        Shard("moment1/w", (2, 2), (0, 0), torch.zeros(2, 2, dtype=torch.bfloat16)),
        Shard("weights/scale", (), (), torch.tensor(2.0)),
    ]
    config = {"model": {"pattern": "ME", "d_model": 16}, "parallel": {"tensor": 2, "expert": 1, "zero": 1}}
    description = {"config": config, "tokens": 640, "validation_loss": 2.5, "processes": 2}
    return store.save(tmp_path / "run" / "checkpoints", 10, shards, description)


def test_everything_inside_is_listed(step: Path) -> None:
    found = inspect(step)
    assert {key: found[key] for key in ("step", "tokens", "validation_loss", "model", "layout", "processes")} == {
        "step": 10,
        "tokens": 640,
        "validation_loss": 2.5,
        "model": {"pattern": "ME", "d_model": 16},
        "layout": {"tensor": 2, "expert": 1, "zero": 1},
        "processes": 2,
    }
    assert found["kinds"] == {
        "weights": {"tensors": 2, "elements": 5, "bytes": 20},
        "moment1": {"tensors": 1, "elements": 4, "bytes": 8},
    }
    assert found["tensors"]["weights/w"] == {"shape": [2, 2], "dtype": "F32", "elements": 4, "bytes": 16, "chunks": 2}
    sizes = {file.name: file.stat().st_size for file in step.iterdir() if file.name != "manifest.json"}
    assert found["files"] == sizes


def test_a_tensor_has_chunks_and_statistics(step: Path) -> None:
    found = inspect_tensor(step, "weights/w")
    assert [(chunk["offsets"], chunk["sizes"]) for chunk in found["chunks"]] == [((0, 0), (1, 2)), ((1, 0), (1, 2))]
    assert {key: found[key] for key in ("nan", "min", "max", "mean")} == {
        "nan": 0,
        "min": -2,
        "max": 4,
        "mean": 0.875,
    }
    assert found["norm"] == pytest.approx(math.sqrt(21.25))
    assert inspect_tensor(step, "weights/scale")["norm"] == 2
    with pytest.raises(UserError, match="has no tensor weights/none: run without --tensor"):
        inspect_tensor(step, "weights/none")


def test_people_and_programs_are_told(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(str(step.parents[1]))
    text = capsys.readouterr().out
    for said in ("pattern ME, d_model 16", "tensor 2, expert 1, zero 1", "2.5000", "rank-00000.safetensors", "2 x 2"):
        assert said in text
    assert text.splitlines()[-1] == f"{step}: valid"
    main(str(step), tensor="weights/w")
    text = capsys.readouterr().out
    assert "from byte" in text
    assert text.splitlines()[-1] == f"{step}: valid"
    main(str(step), json=True)
    assert json.loads(capsys.readouterr().out) == inspect(step) | {"valid": True}
    main(str(step), tensor="weights/w", json=True)
    assert json.loads(capsys.readouterr().out)["nan"] == 0


@pytest.mark.parametrize(("value", "counted"), [(math.nan, 1), (math.inf, 0)])
def test_a_tensor_that_an_older_version_let_be_poisoned_is_named_and_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, counted: int
) -> None:
    shards = [Shard(name, (2,), (0,), torch.tensor([1.0, number])) for name, number in (("a", 2.0), ("b", value))]
    step = save_as_before(tmp_path, 1, shards)
    with pytest.raises(UserError, match=r"step-00000001: b holds NaN or Inf: use another checkpoint$"):
        main(str(step))
    main(str(step), tensor="b")
    assert capsys.readouterr().out.splitlines()[-1] == f"{step}: b holds NaN or Inf"
    main(str(step), tensor="b", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["nan"], found["valid"]) == (counted, False)
    main(str(step), tensor="a", json=True)
    assert json.loads(capsys.readouterr().out)["valid"]


def test_what_the_next_step_gave_is_told(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (inspect(step)["next_step"], inspect(step)["diverged"]) == (None, None)
    store.note_next_step(step.parent, 10, NextStep(math.nan, None), 2)
    main(str(step))
    assert re.search(r"next step +loss nan: it has diverged$", capsys.readouterr().out, re.MULTILINE)
    assert inspect(step)["diverged"] is True
    store.note_next_step(step.parent, 10, NextStep(2.5, 0.125), 2)
    main(str(step.parents[1]))
    assert re.search(r"next step +loss 2.5000, gradient norm 0.125$", capsys.readouterr().out, re.MULTILINE)
    assert inspect(step)["diverged"] is False


def test_a_checkpoint_that_says_little_is_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store.save(tmp_path, 1, [Shard("w", (2,), (0,), torch.ones(2))], {})
    main(str(path))
    assert capsys.readouterr().out.endswith(": valid\n")


def rewrite_index(step: Path, change) -> None:
    """Change the index, and make sizes and checksums fit again."""
    index = json.loads((step / "index.json").read_text())
    change(index["weights/w"])
    data = json.dumps(index).encode()
    (step / "index.json").write_bytes(data)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["index.json"] = {"bytes": len(data), "xxh3": xxhash.xxh3_64(data).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "damage"),
    [
        (lambda tensor: tensor["boxes"].pop(), "the chunks of weights/w hold 2 of 4 elements"),
        (lambda tensor: tensor["boxes"][1].update(offsets=[0, 0]), "the chunks of weights/w overlap, and leave holes"),
        (lambda tensor: tensor["boxes"].append(tensor["boxes"][0]), "the chunks of weights/w hold 6 of 4 elements"),
        (
            lambda tensor: tensor["boxes"][1].update(offsets=[2, 0]),
            r"index.json: the chunks of weights/w do not lie inside it",
        ),
        (
            lambda tensor: tensor["boxes"].clear(),
            r"index.json: weights/w.boxes is \[\]: list should have at least 1 item",
        ),
    ],
)
def test_chunks_that_do_not_make_up_their_tensor_are_named(step: Path, change, damage: str) -> None:
    rewrite_index(step, change)
    for arguments in ({}, {"tensor": "weights/w"}):
        with pytest.raises(UserError, match=damage) as error:
            main(str(step), **arguments)
        assert "\n" not in str(error.value)


def test_the_command_line_ends_in_one_line_and_exit_code_2(refusal: Callable[..., str], step: Path) -> None:
    data = bytearray((step / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "rank-00000.safetensors").write_bytes(data)
    assert refusal(main, f"--checkpoint={step}") == (
        f"error: {step / 'rank-00000.safetensors'} is not what was written (its checksum differs): "
        "use another checkpoint"
    )
