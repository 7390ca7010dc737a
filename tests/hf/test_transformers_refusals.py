"""What has no right answer raises, and what has one gets it: compiled passes, masks, labels, caches, keywords."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.conftest import DESIGNS

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
MASK = torch.ones(2, 16, dtype=torch.int64)
MASK[0, 4:6] = MASK[1, 12:] = 0  # padding inside a text, and behind one


@pytest.fixture
def model(pair: Pair) -> Any:
    return pair("MEM-*E")[1]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 31, (2, 16), generator=torch.Generator().manual_seed(1))


def compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_passes_see_documents_and_padding_as_others_do(model: Any, tokens: Tensor) -> None:
    traced = compiled(model)
    positions = torch.tensor([[*range(8), *range(8)]])
    _close(traced(tokens[:1], position_ids=positions, use_cache=False).logits[:, 8:], model(tokens[:1, 8:]).logits)
    expected, got = (run(tokens, attention_mask=MASK) for run in (model, traced))
    _close(got.logits[MASK.bool()], expected.logits[MASK.bool()])
    longer = torch.cat((MASK, torch.ones(2, 3, dtype=torch.int64)), 1)
    caches = {run: getattr(output, modeling.CACHE) for run, output in (("got", got), ("expected", expected))}
    going_on = [model(tokens[:, :3], attention_mask=longer, cache=cache).logits for cache in caches.values()]
    _close(*going_on)
    for length in (9, 12, 5):  # lengths of other sizes need no graph of their own, or get one
        _close(traced(tokens[:, :length], use_cache=False).logits, model(tokens[:, :length]).logits)


@torch.no_grad()
def test_a_traced_program_reads_any_mask(model: Any, tokens: Tensor) -> None:
    program = torch.export.export(model, (tokens,), {"attention_mask": torch.ones_like(MASK), "use_cache": False})
    got = program.module()(tokens, attention_mask=MASK, use_cache=False).logits
    _close(got[MASK.bool()], model(tokens, attention_mask=MASK, use_cache=False).logits[MASK.bool()])


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_pass_raises_where_it_cannot_look(model: Any, tokens: Tensor) -> None:
    traced = compiled(model)
    _close(traced(tokens, position_ids=torch.arange(16)[None], use_cache=False).logits, model(tokens).logits)
    with pytest.raises(RuntimeError, match="position_ids must rise by one"):
        traced(tokens, position_ids=2 * torch.arange(16)[None], use_cache=False)
    with pytest.raises(RuntimeError, match="attention_mask must hold 1 for text and 0 for padding"):
        traced(tokens, attention_mask=2 * MASK, use_cache=False)
    cache = getattr(model(tokens[:, :10], use_cache=True), modeling.CACHE)
    with pytest.raises(RuntimeError, match="a compiled step for one token begins no document"):
        traced(tokens[:, 10:11], position_ids=torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(RuntimeError, match="a compiled step for one token reads no padding"):
        traced(tokens[:, 10:11], attention_mask=MASK[:, 2:13], cache=cache)
    full = modeling.MoEMambaStaticCache(11)
    model(tokens[:, :10], cache=full)
    traced(tokens[:, 10:11], cache=full)
    with pytest.raises(RuntimeError, match="the cache has room for 11 tokens"):
        traced(tokens[:, 11:12], cache=full)


BOUNDS = ([0, 8, 14], [0, 8, 25], [3, 8, 16], [0, 12, 8, 16], [8])


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"attention_mask": MASK.float().log()}, ValueError, "attention_mask must hold 1 for text and 0 for padding"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2] * 4] * 2)}, ValueError, "attention_mask must hold 1"),
        ({"labels": torch.zeros(1, 32, dtype=torch.int64)}, ValueError, r"labels has shape \(1, 32\), and must be \(2"),
        ({"labels": torch.full((2, 16), 31)}, RuntimeError, "labels must be -100, or tokens from 0 to 30"),
        ({"shift_labels": torch.full((2, 16), -1)}, RuntimeError, "shift_labels must be -100, or tokens from 0 to 30"),
        ({"attention_masks": MASK}, TypeError, "'attention_masks': did you mean attention_mask?"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, ValueError, r"input_ids has shape \(2, 0\)"),
        ({"input_ids": torch.tensor([[1, 31]])}, ValueError, "input_ids has 31, and must have tokens from 0 to 30"),
        ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "input_ids has -1, and must have tokens from 0 to 30"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, ValueError, r"input_ids has shape \(4,\), and must be \(bat"),
        *(
            (
                {"input_ids": torch.ones(1, 16, dtype=torch.int64)}
                | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(bounds)),
                ValueError,
                "cu_seq_lens_q must rise from 0 to the 16 tokens of the row",
            )
            for bounds in BOUNDS
        ),
    ],
)
def test_what_has_no_meaning_is_refused(
    model: Any, tokens: Tensor, keywords: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model(**{"input_ids": tokens, **keywords})


def test_a_cache_goes_on_under_both_names_and_only_from_what_it_has_read(model: Any, tokens: Tensor) -> None:
    greedy = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(tokens, **greedy)

    def read() -> Any:
        with torch.no_grad():
            return getattr(model(tokens[:, :10], use_cache=True), modeling.CACHE)

    for name in ("cache", "past_key_values"):
        cache = read()
        assert torch.equal(model.generate(tokens, **{name: cache}, **greedy), expected)
        with pytest.raises(ValueError, match="the text has 16 tokens, and the cache has read 18: pass the whole text"):
            model.generate(tokens, **{name: cache}, **greedy)
    with pytest.raises(ValueError, match="the text has 6 tokens, and the cache has read 10: pass the whole text"):
        model.generate(tokens[:, 10:], attention_mask=MASK[:, :6] | 1, cache=read(), **greedy)
    with pytest.raises(ValueError, match="two names for the same thing"):
        model.generate(tokens, cache=read(), past_key_values=read(), **greedy)


def test_prompts_padded_on_the_right_are_right_without_a_mask(model: Any, tokens: Tensor) -> None:
    padded = tokens.clone()
    padded[:, 12:] = model.config.pad_token_id
    greedy = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens[:, :12], **greedy)
    assert torch.equal(model.generate(padded, **greedy)[:, 16:], expected[:, 12:])


def test_texts_that_would_change_each_other_are_not_read_together(pair: Pair, tokens: Tensor) -> None:
    _, displaced = pair("ME", {"evaluation_capacity": 1.0})
    with pytest.raises(ValueError, match="displace each other's tokens: generate one at a time"):
        displaced.generate(tokens, max_new_tokens=1)
    assert displaced.generate(tokens[:1], max_new_tokens=1).shape == (1, 17)
    _, chosen = pair("ME", {"router": "expert_choice", "capacity_factor": 1.0})
    for keywords in ({"attention_mask": MASK}, {"position_ids": torch.tensor([[*range(8), *range(8)]])}):
        with pytest.raises(ValueError, match="experts choose among all tokens of a row"):
            chosen(tokens, use_cache=False, **keywords)


@pytest.mark.parametrize(("pattern", "moe"), [("MEM-*E", {}), *DESIGNS.values()], ids=["plain", *DESIGNS])
def test_a_model_can_be_pickled(pair: Pair, tokens: Tensor, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, moe)
    _close(pickle.loads(pickle.dumps(model))(tokens).logits, model(tokens).logits)
