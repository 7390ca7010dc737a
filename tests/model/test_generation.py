from collections.abc import Callable

import pytest
import torch

from moe_mamba.errors import UserError
from moe_mamba.model.generation import Writing, generate, read
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.sampling import Sampling

Tiny = Callable[..., LanguageModel]


@pytest.mark.parametrize("pattern", ["ME", "M*-E"])
def test_greedy_text_is_that_of_whole_passes(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern, moe={"capacity_factor": 0.5})
    model.embedding.weight.data *= 50  # so that the argmax changes from step to step
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


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(20)), [4]]


def written(writing: Writing, steps: int) -> list[list[int]]:
    """What each row gets in so many steps."""
    texts: list[list[int]] = [[] for _ in writing.rows]
    for _ in range(steps):
        for row, token in writing.step().items():
            texts[row].append(token)
    return texts


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, 5, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("pattern", "model"), [("ME", {}), ("M*-E", {}), ("M*-E", {"positions": "none"}), ("MM", {"mamba_norms": True})]
)
def test_a_row_of_a_batch_is_what_its_prompt_gives_by_itself(
    tiny: Tiny, pattern: str, model: dict, sampling: Sampling
) -> None:
    built = tiny(pattern, moe={"capacity_factor": 0.5}, **model).double()
    built.embedding.weight.data *= 20
    seeds, keys = [7, 8, 9, 10, 11], {"end_of_text": 2}
    alone = [
        written(Writing(built, [prompt], sampling, [seed], **keys), 12)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    for chunk in (2048, 12, 1):  # all at once; two tokens of each; one of each, where a step must see the starts
        writing = Writing(built, PROMPTS, sampling, seeds, **keys, chunk=chunk)
        assert written(writing, 12) == alone
        assert writing.rows == [row for row, text in enumerate(alone) if len(text) == 12]
    assert {len(text) for text in alone} != {12}, "no text ends, so none leaves the batch"


def test_rows_that_are_stopped_leave_the_others_alone(tiny: Tiny) -> None:
    model = tiny("M*E").double()
    whole = written(Writing(model, PROMPTS, Sampling(), range(5)), 6)
    writing = Writing(model, PROMPTS, Sampling(), range(5))
    first = writing.step()
    writing.stop([0, 3])
    rest = [writing.step() for _ in range(5)]
    assert [[step[row] for step in (first, *rest)] for row in (1, 2, 4)] == [whole[row] for row in (1, 2, 4)]
    assert all(list(step) == [1, 2, 4] for step in rest)
    writing.stop([1, 2, 4])
    assert writing.rows == [] and writing.step() == {}


@pytest.mark.parametrize("pattern", ["ME", "M*-E"])
def test_reading_in_chunks_equals_one_pass(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern).double().eval()
    tokens = torch.randint(31, (1, 50))
    whole = model(tokens).logits[0, -1]
    for chunk in (50, 16, 7, 49):
        stream, _ = read(model, tokens.tolist(), chunk)
        torch.testing.assert_close(model.logits(stream)[0], whole, rtol=1e-10, atol=1e-10)


def test_end_of_text_waits_for_the_least_number_of_tokens(tiny: Tiny) -> None:
    model = tiny("ME")
    model.embedding.weight.data *= 50
    (argmax,) = generate(model, [1], 1, temperature=0)
    keys = {"temperature": 0, "end_of_text": argmax}
    assert list(generate(model, [1], 5, **keys)) == []
    writing = Writing(model, [[1]], Sampling(0), [0], end_of_text=argmax, min_new_tokens=3)
    (text,) = written(writing, 3)
    assert len(text) == 3 and argmax not in text


def bytes_of(states: list) -> int:
    return sum(value.nbytes for state in states if state for value in vars(state).values() if value is not None)


def grown(model: LanguageModel, chunks: int, length: int = 2048) -> list[int]:
    """Bytes of the states after each of so many chunks."""
    sizes, states = [], model.initial_states(1)
    with torch.no_grad():
        for _ in range(chunks):
            states = model.hidden(torch.randint(31, (1, length)), states=states)[2]
            sizes.append(bytes_of(states))
    return sizes


def test_a_windows_state_stops_growing(tiny: Tiny) -> None:
    sizes = grown(tiny("M*", sliding_window=101).eval(), 4, length=40)
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    assert sizes[3] - bytes_of(tiny("M").initial_states(1)) == 2 * 100 * 16 * 4 + 8  # keys, values, a place


@pytest.mark.parametrize("keys", [{}, {"head_dim": 6, "kv_heads": 2, "sliding_window": 3}], ids=str)
def test_prompts_of_different_lengths_are_each_as_if_by_themselves(tiny: Tiny, keys: dict) -> None:
    model = tiny("*-", **keys).double().eval()
    prompts = [torch.randint(31, (length,)).tolist() for length in (1, 5, 9)]
    together, _ = read(model, prompts, chunk=6)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row], read(model, [prompt])[0][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", ["M", "ME-"])
def test_the_state_is_as_large_after_any_number_of_tokens(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern).eval()
    _, states = read(model, [[1]])
    assert {bytes_of(states)} == set(grown(model, 4)) == {bytes_of(model.initial_states(1))}
    assert len(set(grown(tiny("M*").eval(), 3))) == 3  # attention's grows


@pytest.mark.long
@pytest.mark.parametrize("pattern", ["M", "ME"])
def test_a_million_tokens(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern).eval()
    writing = Writing(model, [torch.randint(31, (2**20,)).tolist()], Sampling(0), [0])
    assert len(writing.step()) == 1
    assert bytes_of(writing._states) == bytes_of(model.initial_states(1))
    assert all(
        value.isfinite().all()
        for state in writing._states
        if state
        for value in vars(state).values()
        if value is not None
    )


def test_expert_choice_is_refused(tiny: Tiny) -> None:
    model = tiny("ME", moe={"router": "expert_choice", "capacity_factor": 1.0})
    with pytest.raises(UserError, match=r"^moe\.router=expert_choice looks ahead.*cannot generate.*$"):
        generate(model, [1], 3)


@pytest.mark.parametrize(
    ("prompt", "keys", "message"),
    [
        ([], {}, "no tokens"),
        ([31], {}, "outside model.vocab_size=31"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_k": 0}, "top_k=0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_settings_are_one_line(tiny: Tiny, prompt: list[int], keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(tiny("-"), prompt, 3, **keys)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts: give"),
        ([[1], []], "prompt 2 has no tokens"),
        ([[1], [2], [3, -1]], "prompt 3 has token -1, outside model.vocab_size=31"),
    ],
)
def test_bad_prompts_of_a_batch_are_named(tiny: Tiny, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Writing(tiny("-"), prompts, Sampling(), [0] * len(prompts))


def test_a_capacity_in_evaluation_takes_one_text_at_a_time(tiny: Tiny) -> None:
    model = tiny("ME", moe={"evaluation_capacity": 1.0})
    assert len(list(generate(model, [1, 2, 3], 4))) == 4
    with pytest.raises(UserError, match=r"^moe\.evaluation_capacity=1 lets the texts .*: generate one at a time$"):
        Writing(model, [[1], [2]], Sampling(), [0, 1])


def test_broken_weights_are_one_line(tiny: Tiny) -> None:
    model = tiny("M")
    model.embedding.weight.data[:] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(UserError, match="logits are NaN or Inf"):
            list(generate(model, [1], 3, temperature=temperature))
