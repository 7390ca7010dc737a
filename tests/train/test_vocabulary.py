"""``model.vocab_size: null``: a run takes its tokenizer's size, and writes it down."""

import json
import shutil
from pathlib import Path

import plan
import pytest

from moe_mamba.checkpoint import store
from moe_mamba.config_file import changed_on_resume, load_config
from moe_mamba.convert.to_hf import export
from moe_mamba.errors import UserError
from moe_mamba.run.folder import RunFolder
from tests.train.runs import STEPS, curve, run, same_weights
from tests.world import World

SIZE = 257  # of the bytes tokenizer


@pytest.fixture(scope="module")
def null(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not told the size."""
    folder = tmp_path_factory.mktemp("null") / "run"
    run(world, tiny, folder, model__vocab_size="null")
    return folder


def saved_sizes(folder: Path) -> list[int]:
    """What the run's configuration and its newest checkpoint say."""
    described = store.read_description(store.resolve(folder))["config"]
    return [load_config(folder / "config.yaml").model.vocab_size, described["model"]["vocab_size"]]


def test_it_is_the_run_that_was_told_the_size(null: Path, plain: Path) -> None:
    assert saved_sizes(null) == [SIZE, SIZE]
    same_weights(null, plain)


def test_every_rank_has_it_and_tensor_parallel_ranks_share_it(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"ranks": 2, "parallel__tensor": 2, "train__steps": 2}
    curves = [
        curve(run(world, tiny, tmp_path / str(size), model__vocab_size=size, **keys))  # type: ignore[arg-type]
        for size in (None, SIZE)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    assert saved_sizes(tmp_path / "None") == [SIZE, SIZE]
    assert store.logical_tensors(store.resolve(tmp_path / "None"))["weights/embedding.weight"][0] == (SIZE, 16)


def test_a_resumed_run_goes_on_with_its_own_size(world: World, tiny: Path, tmp_path: Path, null: Path) -> None:
    shutil.copytree(null, tmp_path / "null")
    longer = {"train__steps": STEPS + 1}
    assert len(curve(run(world, tiny, tmp_path / "null", model__vocab_size=None, **longer))) == STEPS + 1
    run(world, tiny, tmp_path / "larger", model__vocab_size=260, train__steps=1)
    run(world, tiny, tmp_path / "larger", model__vocab_size=None, train__steps=2)
    assert saved_sizes(tmp_path / "larger") == [260, 260]


def test_only_null_asks_for_the_saved_size() -> None:
    saved = load_config(None, {"model.vocab_size": SIZE, "data.tokenizer": "bytes"})
    for size, changed in ((None, []), (SIZE, []), (260, [("model.vocab_size", SIZE, 260)])):
        asked = load_config(None, {"model.vocab_size": size, "data.tokenizer": "bytes"})
        assert changed_on_resume(saved, asked) == changed


def test_weights_to_start_from_must_have_it_too(world: World, tiny: Path, tmp_path: Path, null: Path) -> None:
    keys = {"train__warm_start": str(null), "train__steps": 1}
    assert len(curve(run(world, tiny, tmp_path / "warm", model__vocab_size=None, **keys))) == 1


def test_an_export_has_it(null: Path, tmp_path: Path) -> None:
    export(null, tmp_path / "out", say=lambda _: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == SIZE


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "symbols"])
def test_a_tokenizer_that_is_made_to_the_size_wants_a_number(tokenizer: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.vocab_size=null with data\.tokenizer={tokenizer}.*give it a number"):
        load_config(None, {"model.vocab_size": None, "data.tokenizer": tokenizer})


@pytest.mark.parametrize("size", [0, -3, "many", 1.5])
def test_other_values_are_refused(size: object) -> None:
    with pytest.raises(UserError, match=r"^model\.vocab_size="):
        load_config(None, {"model.vocab_size": size})


def test_a_plan_wants_a_number() -> None:
    with pytest.raises(UserError, match=r"give --model\.vocab_size=N"):
        plan.main(**{"model.vocab_size": None, "data.tokenizer": "bytes"})


def test_it_is_written_as_null_until_it_is_known(tmp_path: Path) -> None:
    config = load_config(None, {"model.vocab_size": "null", "data.tokenizer": "bytes"})
    RunFolder(tmp_path).save_config(config)
    assert "vocab_size: null" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", {"model.vocab_size": SIZE}) == config.with_vocabulary(SIZE)
