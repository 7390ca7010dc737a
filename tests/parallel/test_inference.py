"""Generation and evaluation of a model that no rank holds: the texts and losses of one process, and less memory."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.data.batch import Batch
from moe_mamba.errors import UserError
from moe_mamba.evaluation.scores import evaluate
from moe_mamba.model.sampling import Sampling
from moe_mamba.parallel.generation import start_writing
from moe_mamba.parallel.topology import World
from moe_mamba.run.inference import joined, layout_from, restore_in_layout
from moe_mamba.run.restore import Restored, restore
from tests.designs import INNER
from tests.hf.checkpoints import SIZES, make_run

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(20)), [4]]
STEPS = 8


class Found(NamedTuple):
    """What a rank finds: greedy and sampled texts, (loss, targets, accuracy), elements held of each tensor."""

    greedy: list[list[int]]
    sampled: list[list[int]]
    scores: tuple[float, int, float]
    held: dict[str, int]


def texts(restored: Restored, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[list[int]]:
    """What each prompt gets; of several texts the second is stopped after three tokens."""
    seeds = list(range(7, 7 + len(prompts)))
    writing = start_writing(restored.model, restored.topology, prompts, sampling, seeds, min_new_tokens=1, **options)
    found: list[list[int]] = [[] for _ in prompts]
    for step in range(STEPS):
        for row, token in writing.step().items():
            found[row].append(token)
        writing.stop([1] if step == 2 else [])
    return found


def batches(vocabulary: int) -> list[Batch]:
    """Five of three sequences of seven tokens: neither divides among two ranks; some targets do not count."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(5):
        tokens = torch.randint(vocabulary, (3, 7), generator=generator)
        starts = torch.rand(3, 7, generator=generator) < 0.2
        targets = (5 * tokens + 2) % vocabulary
        targets[torch.rand(3, 7, generator=generator) < 0.2] = -100
        made.append(Batch(tokens, targets, starts))
    return made


def look(restored: Restored, end: int | None) -> Found:
    """Everything that a test compares; ``end`` ends a text."""
    scores = evaluate(restored.model, batches(SIZES["vocab_size"]), restored.topology)
    assert scores is not None
    return Found(
        texts(restored, PROMPTS, Sampling(0), end_of_text=end, chunk=12),
        texts(restored, PROMPTS, Sampling(1.0, 50, 0.9), end_of_text=end),
        (scores.loss, scores.targets, scores.accuracy),
        {name: parameter.numel() for name, parameter in restored.model.named_parameters()},
    )


def found_on_a_rank(folder: Path, layout: dict[str, Any], end: int) -> Found:
    """In a worker."""
    with joined() as world:
        return look(restore_in_layout(folder, layout, world), end)


BIASED = {"kv_heads": 2, "attention_bias": True, "mlp_bias": True, "mamba_norms": True, "activation": "swiglu"}


@pytest.mark.parametrize(
    ("pattern", "ranks", "layout", "moe"),
    [
        pytest.param("M", 2, {"tensor": 2}, {}, marks=pytest.mark.slow),
        ("ME", 2, {"expert": 2}, {}),
        (
            "MEM-*E",
            2,
            {"tensor": 2, "expert": 2},
            {"router": "top_k", "top_k": 2, "shared_experts": 1, "balance": "bias"},
        ),
        pytest.param("MEM-*E", 4, {"tensor": 2, "expert": 4}, {}, marks=pytest.mark.slow),
        ("MEM-*E", 4, {"tensor": 2, "expert": 2, "expert_tensor": True}, {"router": "top_k", "top_k": 2}),
        # more ranks than key and value heads
        pytest.param("M*-", 4, {"tensor": 4}, {}, marks=pytest.mark.slow),
        pytest.param("M*E", 3, {}, {}, marks=pytest.mark.slow),
        ("(ME)(*-)", 2, {"tensor": 2, "expert_tensor": True}, {"router": "top_k", "top_k": 2, "shared_experts": 1}),
        ("MM", 4, {"tensor": 2, "expert": 4}, {"inner": INNER["shared top-2"]}),
        pytest.param("(ME)M", 2, {"tensor": 2}, {"inner": INNER["switch"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts_and_losses_are_those_of_one_process(
    world: Any, tmp_path: Path, pattern: str, ranks: int, layout: dict[str, Any], moe: dict[str, Any]
) -> None:
    make_run(tmp_path, {"pattern": pattern, **BIASED}, moe)
    alone = restore(tmp_path, torch.device("cpu"))
    end = look(alone, None).sampled[2][5]
    expected = look(alone, end)
    assert len(expected.sampled[2]) <= 5 and STEPS in map(len, expected.sampled)
    assert len({token for text in expected.greedy for token in text}) > 3
    results = world.run(found_on_a_rank, tmp_path, layout, end, ranks=ranks)
    for result in results:
        assert (result.greedy, result.sampled) == (expected.greedy, expected.sampled)
        assert result.scores == (pytest.approx(expected.scores[0], abs=1e-5), *expected.scores[1:])
    whole = expected.held
    for result in results:
        for name, held in result.held.items():
            assert held <= local_elements(name, whole[name], layout), name


def local_elements(name: str, whole: int, layout: dict[str, Any]) -> int:
    """Elements of a parameter that a rank may hold at most."""
    tensor, expert = layout.get("tensor", 1), layout.get("expert", 1)
    if ".experts." in name:
        return whole // expert // (tensor if layout.get("expert_tensor") else 1)
    if name.startswith(("embedding", "head")) and tensor > 1:
        return 128 * SIZES["d_model"] * -(-SIZES["vocab_size"] // (128 * tensor))  # padded
    is_key = "k_proj" in name or "v_proj" in name
    replicated = (".norm.", "final_norm", "router", "_norm.", "o_proj.bias", "out_proj.bias")
    return whole if any(word in name for word in replicated) else whole // (min(tensor, 2) if is_key else tensor)


def elements_read(folder: Path, layout: dict[str, Any]) -> int:
    """In a worker: what the store is asked for."""
    asked: list[int] = []
    load = store.load

    def counted(path: Path, shards: list[Shard]) -> None:
        asked.extend(shard.tensor.numel() for shard in shards)
        load(path, shards)

    with pytest.MonkeyPatch.context() as patch, joined() as world:
        patch.setattr(store, "load", counted)
        restore_in_layout(folder, layout, world)
    return sum(asked)


def test_a_rank_asks_the_store_for_its_shards_alone(world: Any, tmp_path: Path) -> None:
    model = make_run(tmp_path, {"pattern": "ME", "d_model": 32}, {"experts": 8, "d_expert": 128})
    whole = sum(parameter.numel() for parameter in model.parameters())
    asked = world.run(elements_read, tmp_path, {"tensor": 2, "expert": 4}, ranks=4)
    assert max(asked) < whole // 2
    assert sum(asked) >= whole


REFUSED: list[tuple[dict[str, Any], list[list[int]], str]] = [
    ({"tensor": 3}, PROMPTS, "parallel.tensor=3 does not divide the number of processes, 2: "),
    ({"tensor": 2, "expert": 4}, PROMPTS, "parallel.expert=4 does not divide the number of processes, 2: "),
    ({"tensr": 2}, PROMPTS, "unknown key parallel.tensr: did you mean parallel.tensor?"),
    ({"expert": 2}, [[1], []], "prompt 2 has no tokens: give some text"),
]


def refusals(folder: Path) -> list[str]:
    """In a worker: the lines that a rank ends with."""
    lines = []
    with joined() as world:
        for layout, prompts, _ in REFUSED:
            with pytest.raises(UserError) as error:
                texts(restore_in_layout(folder, layout, world), prompts, Sampling(0))
            lines.append(str(error.value))
    return lines


def test_every_rank_is_refused_in_one_line(world: Any, tmp_path: Path) -> None:
    make_run(tmp_path, {"pattern": "ME"})
    first, second = world.run(refusals, tmp_path)
    assert first == second
    for line, (_, _, message) in zip(first, REFUSED, strict=True):
        assert line.startswith(message) and "\n" not in line


def broken(folder: Path, layout: dict[str, Any]) -> str:
    """In a worker: the last data-parallel rank's logits are NaN, in the second step."""
    with pytest.raises(UserError) as error, joined() as world:
        restored = restore_in_layout(folder, layout, world)
        gather = restored.model.gather_logits
        passes = iter(range(9))

        def spoilt(logits: Tensor) -> Tensor:
            return gather(logits) * (math.nan if world.rank == 1 and next(passes) == 1 else 1)

        restored.model.gather_logits = spoilt
        texts(restored, PROMPTS, Sampling(0))
    return str(error.value)


def test_what_one_rank_cannot_draw_ends_all(world: Any, tmp_path: Path) -> None:
    make_run(tmp_path, {"pattern": "ME"})
    lines = world.run(broken, tmp_path, {"expert": 2})
    assert set(lines) == {"the model's logits are NaN or Inf: use an earlier checkpoint"}


def found_with_capacity(folder: Path, layout: dict[str, Any]) -> tuple[float, list[list[int]]]:
    """In a worker, or in one process."""
    with joined() as world:
        restored = restore_in_layout(folder, layout, world)
        scores = evaluate(restored.model, batches(SIZES["vocab_size"]), restored.topology)
        assert scores is not None
        text = [] if restored.config.moe.router == "expert_choice" else texts(restored, PROMPTS[3:4], Sampling(0))
        return scores.loss, text


@pytest.mark.slow
@pytest.mark.parametrize(
    "moe", [{"evaluation_capacity": 0.6}, {"router": "expert_choice", "capacity_factor": 1.0}], ids=str
)
def test_tokens_that_displace_each_other_are_routed_together(world: Any, tmp_path: Path, moe: dict[str, Any]) -> None:
    make_run(tmp_path, {"pattern": "ME"}, moe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "from_environment", lambda local_rank=None: World(0, 1, 0, 1))
        expected = found_with_capacity(tmp_path, {})
    for loss, text in world.run(found_with_capacity, tmp_path, {"tensor": 2, "expert": 4}, ranks=4):
        assert loss == pytest.approx(expected[0], abs=1e-5) and text == expected[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_tokens": "3"}, "unknown flag --max_tokens: --help lists the flags"),
        ({"model.d_model": "3"}, "unknown flag --model.d_model: --help lists the flags"),
        ({"parallel.zero": "3"}, r"parallel.zero=3 is for training: leave it out; a model is divided by parallel.ten"),
    ],
)
def test_flags_without_a_meaning_are_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        layout_from(flags)
