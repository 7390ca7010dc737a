import itertools
import json
import random
from typing import Any

import pytest

from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.train.schedule import RateCurve


def asked(steps: int, way: str = "continue", **values: Any) -> Config:
    return parse_config({"train": {"steps": steps, "on_longer_budget": way, "learning_rate": 1.0} | values})


def begin(steps: int, **values: Any) -> RateCurve:
    return RateCurve.resumed(asked(steps, **values), 0, {})


def resume(curve: RateCurve, done: int, steps: int, way: str = "continue", **values: Any) -> RateCurve:
    """The same run again, after `done` steps, with another budget."""
    description = {"config": curve.config.model_dump(), "rates": curve.to_json()}
    return RateCurve.resumed(asked(steps, way, **values), done, json.loads(json.dumps(description)))


def rates(curve: RateCurve, first: int = 1) -> list[float]:
    return [curve.rate(step) for step in range(first, curve.config.steps + 1)]


def never_rises(values: list[float]) -> bool:
    return all(one >= other for one, other in itertools.pairwise(values))


def test_cosine_rises_linearly_and_ends_at_the_minimum() -> None:
    curve = rates(begin(100, warmup=0.1, minimum_rate=0.1))
    assert curve[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert curve[-1] == pytest.approx(0.1)
    assert curve[54] == pytest.approx(0.55, abs=1e-6)
    assert never_rises(curve[9:])


def test_stable_then_decay_falls_in_a_line_only_at_the_end() -> None:
    curve = rates(begin(100, schedule="wsd", warmup=0.1, decay=0.2, minimum_rate=0.0))
    assert curve[9:80] == pytest.approx([1.0] * 71)
    assert curve[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


def test_stable_without_decay_is_constant_to_the_last_step() -> None:
    assert rates(begin(100, schedule="wsd", warmup=0.1, decay=0.0))[9:] == [1.0] * 91


def test_a_longer_stable_run_has_the_same_beginning() -> None:
    values = {"schedule": "wsd", "warmup": 0.0, "decay": 0.1}
    assert rates(begin(100, **values))[:90] == rates(begin(200, **values))[:90]


def test_a_stable_run_that_goes_on_longer_is_the_one_that_was_planned_so() -> None:
    values = {"schedule": "wsd", "warmup": 0.0, "decay": 0.1}
    assert rates(resume(begin(100, **values), 80, 200, **values)) == rates(begin(200, **values))


def test_a_finished_cosine_goes_on_at_its_last_rate() -> None:
    curve = resume(begin(20, warmup=0.1), 20, 100)
    assert rates(curve, 21) == pytest.approx([0.1] * 80)
    assert rates(curve)[:20] == rates(begin(20, warmup=0.1))
    assert "20 steps became 100: the learning rate goes from 0.1 at step 20 to 0.1 at step 21" in curve.note
    assert "as_planned: 0.912" in curve.note


def test_continue_never_raises_the_rate_whatever_changes_with_the_budget() -> None:
    draw = random.Random(0)
    tried = 0
    for _ in range(400):
        shapes = [
            {
                "schedule": draw.choice(["cosine", "wsd"]),
                "warmup": draw.choice([0.0, 0.01, 0.1, 0.5, 1.0]),
                "decay": draw.choice([0.0, 0.01, 0.2, 1.0]),
                "minimum_rate": draw.choice([0.0, 0.1, 1.0]),
                "learning_rate": draw.choice([1.0, 1.0, 0.5, 3.0]),
            }
            for _ in range(3)
        ]
        curve = begin(draw.randint(1, 60), **shapes[0])
        for shape in shapes[1:]:
            done = draw.randint(1, curve.config.steps)
            last = curve.rate(done)
            was_rising = done < curve.stretches[-1].warm_end
            longer = resume(curve, done, done + draw.choice([1, 2, 50, 500]), **shape)
            if longer.config.steps != curve.config.steps and not was_rising:
                after = [last, *rates(longer, done + 1)]
                assert never_rises([round(rate, 12) for rate in after]), (curve, longer)
                assert min(after) >= 0
                tried += 1
            curve = longer
    print(f"{tried} seams tried")
    assert tried > 150


def test_a_warm_up_under_way_goes_on_as_it_was() -> None:
    short = begin(100, warmup=0.2)
    assert rates(resume(short, 10, 200, warmup=0.2))[:20] == pytest.approx(rates(short)[:20])
    assert rates(resume(short, 10, 15, warmup=0.2)) == pytest.approx(rates(short)[:15])


def test_rewarm_rises_from_the_last_rate_to_the_peak_and_falls_again() -> None:
    curve = resume(begin(20), 20, 120, "rewarm", warmup=0.1)
    after = rates(curve, 20)
    assert after[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])
    assert never_rises(after[10:])
    assert after[-1] == pytest.approx(0.1)


def test_as_planned_is_the_rate_of_a_run_that_was_planned_so_long() -> None:
    assert rates(resume(begin(20), 20, 100, "as_planned")) == rates(begin(100))


def test_a_shorter_budget_falls_from_the_rate_as_it_is() -> None:
    for way in ("continue", "rewarm"):
        after = rates(resume(begin(100), 50, 60, way), 50)
        assert after[0] == begin(100).rate(50)
        assert never_rises(after)
        assert after[-1] == pytest.approx(0.1)


def test_a_resume_with_the_same_budget_goes_on_with_the_same_curve() -> None:
    curve = begin(20)
    assert resume(curve, 7, 20) == curve
    for longer in (resume(curve, 15, 60), resume(curve, 20, 60, "rewarm")):
        again = resume(longer, 40, 60)
        assert rates(again) == rates(longer)
        assert not again.note


def test_a_checkpoint_of_before_says_nothing_of_its_rates_and_is_read_by_its_config() -> None:
    old = {"config": asked(20).model_dump()}
    del old["config"]["train"]["on_longer_budget"]
    assert RateCurve.resumed(asked(100), 20, old).rate(21) == pytest.approx(0.1)
    assert rates(RateCurve.resumed(asked(20), 10, old)) == rates(begin(20))


def test_another_shape_with_the_same_budget_is_said() -> None:
    curve = resume(begin(20), 10, 20, learning_rate=0.5)
    assert curve.note.startswith("train.learning_rate was 1.0 and is now 0.5: the learning rate of step 11 is ")
    assert resume(begin(20), 10, 20, schedule="wsd").note.startswith("train.schedule was cosine and is now wsd")


@pytest.mark.parametrize(
    ("curve", "line"),
    [
        (begin(100, warmup=0.1), "up to 1 at step 10, then a cosine to 0.1 at step 100"),
        (
            begin(100, warmup=0.1, schedule="wsd"),
            "up to 1 at step 10, then constant, and over the last 20 steps a line to 0.1",
        ),
        (begin(100, warmup=0.1, schedule="wsd", decay=0), "up to 1 at step 10, then constant"),
        (resume(begin(20), 20, 100), "0.1 at step 20, constant"),
        (
            resume(begin(20), 20, 120, "rewarm", warmup=0.1),
            "0.1 at step 20, up to 1 at step 30, then a cosine to 0.1 at step 120",
        ),
    ],
)
def test_the_header_tells_the_curve(curve: RateCurve, line: str) -> None:
    assert curve.describe() == line
