from collections.abc import Callable

import pytest
import torch

from moe_mamba.errors import UserError
from moe_mamba.model.generation import generate, sample
from moe_mamba.model.language_model import LanguageModel

Tiny = Callable[..., LanguageModel]


@pytest.mark.parametrize("pattern", ["ME", "M*-E"])
def test_greedy_text_is_that_of_whole_passes(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern, moe={"capacity_factor": 0.5})
    model.embedding.weight.data *= 50  # so that the likeliest token changes from step to step
    text = [3, 1, 4]
    got = list(generate(model, text, 8, temperature=0))
    with torch.no_grad():
        for _ in range(8):
            text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
    assert got == text[3:]
    assert len(set(got)) > 1


def test_seed_decides(tiny: Tiny) -> None:
    model = tiny("ME")
    one, same, other = (list(generate(model, [1], 12, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_stops_before_end_of_text_and_streams(tiny: Tiny) -> None:
    model = tiny("ME")
    whole = list(generate(model, [1], 12, seed=1))
    stop = whole[5]
    assert list(generate(model, [1], 12, seed=1, end_of_text=stop)) == whole[: whole.index(stop)]
    assert next(generate(model, [1], 10**9, seed=1)) == whole[0]


def test_state_does_not_grow_without_attention(tiny: Tiny) -> None:
    model = tiny("ME-").eval()
    sizes = []
    with torch.no_grad():
        states = model.initial_states(1)
        for _ in range(5):
            states = model(torch.tensor([[1]]), states=states).states
            sizes.append(sum(value.numel() for state in states if state for value in vars(state).values()))
    assert len(set(sizes)) == 1


def test_top_k_and_top_p_draw_from_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**keys: object) -> set[int]:
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | keys
        return {sample(logits, generator=generator, **settings) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {2, 3}
    assert drawn(top_p=0.39) == {2}
    assert drawn(top_p=0.41) == {2, 3}
    assert drawn(top_k=3, top_p=0.75) == {2, 3}
    assert drawn(top_k=100) == {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn(temperature=1e-3) == {2}


def test_frequencies_are_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 2.0, 3.0])
    counts = torch.bincount(torch.tensor([sample(logits, 2.0, None, 1.0, generator) for _ in range(4000)]))
    torch.testing.assert_close(counts / 4000, (logits / 2).softmax(0), rtol=0, atol=0.03)


def test_expert_choice_is_refused(tiny: Tiny) -> None:
    model = tiny("ME", moe={"router": "expert_choice", "capacity_factor": 1.0})
    with pytest.raises(UserError, match=r"^moe\.router=expert_choice looks ahead.*cannot generate.*$"):
        generate(model, [1], 3)


@pytest.mark.parametrize(
    ("prompt", "keys", "message"),
    [
        ([], {}, "no tokens"),
        ([31], {}, "past model.vocab_size=31"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_k": 0}, "top_k=0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_settings_are_one_line(tiny: Tiny, prompt: list[int], keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(tiny("-"), prompt, 3, **keys)
