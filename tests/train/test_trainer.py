"""Whole runs, small: what a user starts, and what lies in the run's folder afterwards."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.train import train
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import read_metrics
from tests.train.runs import STEPS, curve, run, weights
from tests.train.seams import stepping_in
from tests.world import WorkerError, World


def test_a_run_leaves_what_scripts_rely_on(plain: Path) -> None:
    metrics = read_metrics(plain)
    lines = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["tokens"] == line["step"] * 8 * 32
        assert {"learning_rate", "gradient_norm", "tokens_per_second", "balance_loss", "dropped"} <= line.keys()
        (load,) = line["expert_load"].values()
        assert len(load) == 4
        assert sum(load) == pytest.approx(1, abs=1e-3)
        assert 0 <= line["moe"]["router_entropy"]["1"] <= math.log(4) + 1e-6
    assert [line["step"] for line in metrics if "validation_loss" in line] == [3, 6]
    assert lines[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (plain / "config.yaml").is_file()
    assert (plain / "log.txt").is_file()
    assert {path.name for path in (plain / "plots").iterdir()} == {"loss.png", "expert_load.png"}
    kept = sorted(path.name for path in (plain / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000006"]


def test_the_learning_rate_is_the_schedules(plain: Path) -> None:
    rates = [line["learning_rate"] for line in read_metrics(plain) if "loss" in line]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)


def test_a_finished_run_says_so_and_stays_as_it_is(world: World, tiny: Path, plain: Path) -> None:
    before = (plain / "metrics.jsonl").read_bytes()
    run(world, tiny, plain)
    assert "is finished" in (plain / "log.txt").read_text().splitlines()[-1]
    assert (plain / "metrics.jsonl").read_bytes() == before


TENSOR_RANKS = {"ranks": 4, "parallel__tensor": 2, "train__micro_batch": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        *(
            pytest.param(keys, marks=pytest.mark.slow)
            for keys in (
                {"train__precision": "bf16"},
                {"parallel__zero": 0},
                {"parallel__zero": 2},
                {"parallel__zero": 3, "model__pattern": "*-"} | TENSOR_RANKS,
                {"train__precision": "bf16", "parallel__zero": 2} | TENSOR_RANKS,
                {"parallel__zero": 0, "parallel__expert": 2} | TENSOR_RANKS,
                {"parallel__offload_optimizer": True} | TENSOR_RANKS,
            )
        ),
        {"model__pattern": "*E"} | TENSOR_RANKS,
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    world: World, tiny: Path, tmp_path: Path, overrides: dict
) -> None:
    whole = run(world, tiny, tmp_path / "whole", **overrides)
    part = tmp_path / "part"
    run(world, tiny, part, **overrides)
    for late in ("step-00000006", "step-00000004"):
        for file in sorted((part / "checkpoints" / late).rglob("*"), reverse=True):
            file.unlink()
        (part / "checkpoints" / late).rmdir()
    resumed = run(world, tiny, part, **overrides)
    assert "resumed" in (part / "log.txt").read_text()
    assert curve(resumed) == curve(whole)
    assert [line.get("validation_loss") for line in resumed] == [line.get("validation_loss") for line in whole]
    expected, found = weights(tmp_path / "whole"), weights(part)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_longer_budget_goes_on_from_the_last_rate_and_keeps_to_it(world: World, tiny: Path, tmp_path: Path) -> None:
    """Also where the longer run is resumed once more; the checkpoints know the seam."""
    folder, steps = tmp_path / "run", STEPS + 4
    run(world, tiny, folder)
    longer = run(world, tiny, folder, train__steps=steps, logging__plots=False)
    rates = [line["learning_rate"] for line in longer if "loss" in line]
    assert len(rates) == steps
    assert rates[STEPS:] == pytest.approx([rates[STEPS - 1]] * 4)
    said = (folder / "log.txt").read_text()
    assert f"rate      0.001 at step {STEPS}, constant" in said
    assert f"{STEPS} steps became {steps}: the learning rate goes from 0.001 at step {STEPS} to 0.001 at step" in said
    expected = weights(folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{steps:08}")
    again = run(world, tiny, folder, train__steps=steps, logging__plots=False)
    assert [line["learning_rate"] for line in again if "loss" in line] == rates
    found = weights(folder)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_longer_run_sees_the_same_past(world: World, tiny: Path, plain: Path, tmp_path: Path) -> None:
    wsd = {"train__schedule": "wsd", "train__warmup": 0.0, "train__decay": 0.0}
    short = curve(run(world, tiny, tmp_path / "a", **wsd))
    long = curve(run(world, tiny, tmp_path / "b", train__steps=STEPS + 3, **wsd))
    assert long[:STEPS] == short


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, {"train__micro_batch": 2}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero": 2, "train__micro_batch": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_global_batch_stands_however_it_is_shared(
    world: World, tiny: Path, tmp_path: Path, ranks: int, overrides: dict
) -> None:
    """Dropless, without the balance loss, whose share is of a micro-step."""
    dropless = {"moe__capacity_factor": "null", "moe__balance": "none"}
    whole = curve(run(world, tiny, tmp_path / "whole", train__micro_batch=8, **dropless))
    shared = curve(run(world, tiny, tmp_path / "shared", ranks=ranks, **dropless, **overrides))
    assert shared == pytest.approx(whole, rel=1e-5)


def test_bf16_micro_steps_add_up_in_fp32(world: World, tiny: Path, tmp_path: Path) -> None:
    bf16 = {"train__precision": "bf16", "moe__capacity_factor": "null", "moe__balance": "none"}
    whole = curve(run(world, tiny, tmp_path / "whole", train__micro_batch=8, **bf16))
    shared = curve(run(world, tiny, tmp_path / "shared", train__micro_batch=1, **bf16))
    assert shared == pytest.approx(whole, rel=5e-3)


def test_a_validation_may_read_a_part_of_its_set(world: World, tiny: Path, plain: Path, tmp_path: Path) -> None:
    metrics = run(world, tiny, tmp_path / "run", train__validation_batches=1, logging__every=4)
    assert [line["step"] for line in metrics if "loss" in line] == [4, 6]
    part, whole = ([line for line in lines if "validation_loss" in line] for lines in (metrics, read_metrics(plain)))
    assert [line["step"] for line in part] == [line["step"] for line in whole]
    assert part[-1]["validation_loss"] != whole[-1]["validation_loss"]


def test_balance_statistics_are_of_all_ranks(world: World, tiny: Path, tmp_path: Path) -> None:
    dropless = {"moe__capacity_factor": "null", "moe__balance_weight": 1.0, "moe__z_loss_weight": 0.1}
    single = run(world, tiny, tmp_path / "single", train__micro_batch=8, **dropless)
    shared = run(world, tiny, tmp_path / "shared", ranks=2, train__micro_batch=4, **dropless)
    assert curve(shared) == pytest.approx(curve(single), rel=1e-5)
    for mine, other in zip(single, shared, strict=True):
        if "loss" in mine:
            assert mine["balance_loss"] == pytest.approx(other["balance_loss"], rel=1e-5)
            assert mine["expert_load"] == other["expert_load"]


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_back(world: World, tiny: Path, tmp_path: Path) -> None:
    constant = {"train__schedule": "wsd", "train__warmup": 0.0, "train__decay": 0.0, "train__minimum_rate": 1.0}
    dropless = {"moe__capacity_factor": "null", "moe__balance": "none", "train__micro_batch": 4} | constant
    whole = run(world, tiny, tmp_path / "whole", train__steps=9, **dropless)
    moved = tmp_path / "moved"
    run(world, tiny, moved, ranks=2, train__steps=3, **dropless)
    run(world, tiny, moved, ranks=1, train__steps=6, parallel__zero=0, **dropless)
    metrics = run(world, tiny, moved, ranks=2, train__steps=9, parallel__zero=2, **dropless)
    assert curve(metrics) == pytest.approx(curve(whole), rel=1e-5)


def test_balancing_biases_are_trained_and_kept(world: World, tiny: Path, tmp_path: Path) -> None:
    run(world, tiny, tmp_path / "run", moe__balance="bias", moe__bias_rate=0.01)
    bias = weights(tmp_path / "run")["weights/layers.1.mixer.router.balance_bias"]
    assert bias.abs().max() > 0
    assert torch.allclose(bias / 0.01, (bias / 0.01).round(), atol=1e-4)


def test_a_warm_start_takes_weights_and_a_fresh_optimizer(
    world: World, tiny: Path, plain: Path, tmp_path: Path
) -> None:
    metrics = run(world, tiny, tmp_path / "run", train__warm_start=str(plain))
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, STEPS + 1))
    assert curve(metrics)[0] < curve(read_metrics(plain))[0] - 0.1


def test_recomputation_and_determinism_change_no_loss(world: World, tiny: Path, plain: Path, tmp_path: Path) -> None:
    metrics = run(world, tiny, tmp_path / "run", train__recompute=True, train__deterministic=True)
    assert curve(metrics) == pytest.approx(curve(read_metrics(plain)), rel=1e-6)


@pytest.mark.long
def test_compiled_layers_give_the_same_curve(world: World, tiny: Path, plain: Path, tmp_path: Path) -> None:
    metrics = run(world, tiny, tmp_path / "run", train__compile=True)
    assert curve(metrics) == pytest.approx(curve(read_metrics(plain)), rel=1e-5)


def test_corpora_blend_and_validation_sets_have_names(
    world: World, tiny: Path, corpus: Path, plain: Path, tmp_path: Path
) -> None:
    train, held_out = str(corpus / "train.jsonl"), str(corpus / "validation.jsonl")
    metrics = run(
        world,
        tiny,
        tmp_path / "run",
        data__train=json.dumps({train: 0.75, held_out: 0.25}),
        data__validation=json.dumps({"seen": train, "held_out": held_out}),
    )
    (first, last) = (line for line in metrics if "validation_loss" in line)
    assert set(last["validation"]) == {"seen", "held_out"}
    assert last["validation_loss"] == last["validation"]["seen"]["loss"] < first["validation_loss"]
    assert curve(metrics) != curve(read_metrics(plain))


def test_a_budget_in_tokens_is_a_number_of_steps(world: World, tiny: Path, tmp_path: Path) -> None:
    metrics = run(world, tiny, tmp_path / "run", train__steps="null", train__tokens=3 * 8 * 32 + 5)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]


def test_a_profile_is_a_trace_of_the_asked_steps(world: World, tiny: Path, tmp_path: Path) -> None:
    run(world, tiny, tmp_path / "run", train__profile=2)
    trace = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())
    assert any("ProfilerStep" in event.get("name", "") for event in trace["traceEvents"])


def train_with_a_nan(rank: int, parameter: str, **arguments: Any) -> None:
    """Train; after the second step, one weight of a rank becomes NaN."""

    def poison(trainer: Any) -> None:
        if trainer.made == 2 and trainer.world.rank == rank:
            trainer.model.get_parameter(parameter).data.view(-1)[0] = math.nan

    with stepping_in("step", poison):
        train(**arguments)


@pytest.mark.parametrize(
    ("zero", "ranks", "place"),
    [
        pytest.param(
            0, 1, "the first bad value is in the parameter layers.0.mixer.x_proj.weight", marks=pytest.mark.slow
        ),
        (0, 2, "the first bad value is in the parameter layers.0.mixer.x_proj.weight"),
        (1, 2, "made again, the pass is right: a weight was spoilt in memory"),
    ],
)
def test_a_loss_of_nan_names_step_and_place_and_keeps_the_checkpoint(
    world: World, tiny: Path, tmp_path: Path, zero: int, ranks: int, place: str
) -> None:
    keys = {"run.folder": str(tmp_path / "run"), "train.micro_batch": 2, "parallel.zero": zero}
    with pytest.raises(WorkerError) as stop:
        world.run(train_with_a_nan, ranks - 1, "layers.0.mixer.x_proj.weight", ranks=ranks, config=str(tiny), **keys)
    message = next(line for line in str(stop.value).splitlines() if "RunStopped: " in line)
    assert f"the loss is nan at step 3; {place}. " in message
    assert "step-00000002 is kept" in message
    same_keys = {"train__micro_batch": 2, "parallel__zero": zero}
    assert len(curve(run(world, tiny, tmp_path / "run", ranks=ranks, **same_keys))) == STEPS


def test_a_run_that_diverges_stops(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"RunStopped: the loss is .*at step \d+"):
        # Each step multiplies every weight by 1 - rate x decay.
        run(world, tiny, tmp_path / "run", train__learning_rate=100, train__weight_decay=1000, train__decay_all=True)


def test_a_folder_in_use_is_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with folder.locked(), pytest.raises(WorkerError, match="in use by another run"):
        run(world, tiny, folder.path)
    assert len(curve(run(world, tiny, folder.path))) == STEPS


@pytest.mark.slow
def test_a_run_that_never_saved_may_be_changed(world: World, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    """SentencePiece of a first try that was too short for one window is not kept for the second."""
    short = tmp_path / "short.txt"
    short.write_text("One line of text, and no more of it. " * 5)
    shards = {"data__tokenizer": "sentencepiece", "model__vocab_size": 300}
    with pytest.raises(WorkerError, match="fewer than one sequence"):
        run(world, tiny, tmp_path / "run", data__train=str(short), data__sequence_length=999, **shards)
    run(world, tiny, tmp_path / "run", **shards)
    first = load_tokenizer(tmp_path / "run" / "tokenizer")
    run(world, tiny, tmp_path / "other", **shards)
    assert first.fingerprint == load_tokenizer(tmp_path / "other" / "tokenizer").fingerprint


def test_damaged_lines_are_said_and_kept(world: World, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes((corpus / "train.jsonl").read_bytes() + b"{not json\n")
    run(world, tiny, tmp_path / "run", data__train=str(damaged))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"warning +1 damaged lines of .*damaged\.jsonl .*rejects\.jsonl", log)


def test_pictures_that_a_kill_prevented_are_drawn(world: World, tiny: Path, tmp_path: Path) -> None:
    for plots in (False, True):
        run(world, tiny, tmp_path / "run", train__steps=1, logging__plots=plots)
        assert (tmp_path / "run" / "plots").exists() == plots
    assert len(list((tmp_path / "run" / "plots").iterdir())) == 2


def test_the_end_of_a_run_says_what_was_reached(plain: Path) -> None:
    log = (plain / "log.txt").read_text()
    for part in ("result ", "bits per byte", "the unigram entropy", "pictures ", "sample ", "next "):
        assert part in log


def test_another_model_is_refused_with_a_proposal(world: World, tiny: Path, plain: Path) -> None:
    with pytest.raises(WorkerError, match=r"model\.d_model was 16 .* is now 32.*run\.folder=.*run-2"):
        run(world, tiny, plain, model__d_model=32)


def test_other_text_under_the_same_name_is_refused(world: World, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes((corpus / "train.jsonl").read_bytes())
    run(world, tiny, tmp_path / "run", data__train=str(text), train__steps=2)
    text.write_bytes(text.read_bytes().replace(b"plus", b"minus"))
    with pytest.raises(WorkerError, match=r"text\.jsonl holds different text than .*--run\.folder=.*run-2"):
        run(world, tiny, tmp_path / "run", data__train=str(text), train__steps=4)


def test_a_warm_start_from_nowhere_is_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"UserError: .*nowhere"):
        run(world, tiny, tmp_path / "run", train__warm_start=str(tmp_path / "nowhere"))


def test_a_warm_start_from_another_model_is_refused(world: World, tiny: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"another model: weights/embedding\.weight has the shape \(257, 16\)"):
        run(world, tiny, tmp_path / "run", train__warm_start=str(plain), model__d_model=32)


def test_a_micro_batch_that_does_not_divide_is_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"train\.micro_batch=8 .* set train\.micro_batch=4"):
        run(world, tiny, tmp_path / "run", ranks=2, train__micro_batch=8)


def test_a_global_batch_that_does_not_divide_is_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"train\.global_batch=9 .* 2 processes"):
        run(world, tiny, tmp_path / "run", ranks=2, train__global_batch=9)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"257 tokens, more than model\.vocab_size=100"):
        run(world, tiny, tmp_path / "run", model__vocab_size=100)


def dtypes_in_the_engine(config: str, folder: str) -> dict[str, str]:
    """Build the engine of a bf16 run and list what its parameters and masters are."""
    from moe_mamba.config_file import load_config
    from moe_mamba.parallel.engine import build_engine, state_shards
    from tests.parallel.layouts import build

    settings = load_config(config, {"train.precision": "bf16", "moe.balance": "bias", "model.mamba_norms": "True"})
    built = build(settings)
    engine = build_engine(built.model, settings, built.groups, 8)
    found = {name: str(value.dtype) for name, value in engine.module.state_dict().items()}
    found["accumulated gradients"] = str(engine.optimizer.gradient_accumulation_dtype)
    assert engine.optimizer.use_grad_accum_attribute
    return found | {f"shard {shard.name}": str(shard.tensor.dtype) for shard in state_shards(engine, built.held)}


def test_small_parameters_stay_fp32_in_a_bf16_engine(world: World, tiny: Path, tmp_path: Path) -> None:
    (found,) = world.run(dtypes_in_the_engine, str(tiny), str(tmp_path), ranks=1)
    fp32 = ("A_log", "mixer.D", "dt_proj.bias", "norm.weight", "router.weight", "balance_bias")
    for name, dtype in found.items():
        is_fp32 = name.startswith(("shard ", "accumulated")) or name.endswith(fp32)
        assert dtype == ("torch.float32" if is_fp32 else "torch.bfloat16"), name
    assert sum(name.endswith("A_log") for name in found) == 4  # running weight, master, two moments
