"""What Transformers expects of a model that generates."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.conftest import DESIGNS

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")
MoEMambaCache = modeling.MoEMambaCache

Pair = Callable[..., Any]
TOP_2 = {"router": "top_k", "top_k": 2, "renormalize": True}
FAMILIES = {pattern: (pattern, TOP_2) for pattern in ("M", "ME", "*E", "MEM-*E")}
FAMILIES |= {name: DESIGNS[name] for name in ("parallel attention", "own, top 2", "shared, top 2")}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def model(request: pytest.FixtureRequest, pair: Pair) -> Any:
    """One of a few families, with its random weights scaled up so that its choices are clear."""
    _, theirs = pair(*request.param)
    with torch.no_grad():
        theirs.lm_head.weight *= 4
    return theirs


def _close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_greedy_equals_teacher_forcing(model: Any) -> None:
    prompt = torch.randint(2, 31, (2, 5))
    out = model.generate(prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    logits = model(out.sequences).logits[:, 4:-1]
    assert torch.equal(out.sequences[:, 5:], logits.argmax(-1))
    _close(torch.stack(out.logits, 1), logits)
    assert isinstance(out.past_key_values, MoEMambaCache)


def test_cached_equals_uncached(model: Any) -> None:
    prompt = torch.randint(2, 31, (2, 5))
    keys = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(prompt, **keys, use_cache=wanted) for wanted in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    _close(torch.stack(cached.logits), torch.stack(uncached.logits))
    assert uncached.past_key_values is None


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_with_left_padding_equals_each_prompt_by_itself(model: Any, chunk: int | None) -> None:
    prompts = [torch.randint(2, 31, (length,)) for length in (1, 4, 7)]
    batch, mask = torch.ones(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    keys = {**GREEDY, "prefill_chunk_size": chunk, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(batch, attention_mask=mask, **keys)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **keys)
        assert torch.equal(together.sequences[row, 7:], alone.sequences[0, len(prompt) :])
        _close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])
    # the same without a cache, and with what stands in the padding changed
    batch = torch.where(mask == 1, batch, 17)
    again = model.generate(batch, attention_mask=mask, **{**keys, "prefill_chunk_size": None}, use_cache=False)
    _close(torch.stack(again.logits), torch.stack(together.logits))


def test_a_row_may_start_while_others_go_on(model: Any) -> None:
    tokens = torch.randint(2, 31, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    cache = MoEMambaCache()
    steps = [model(tokens[:, t : t + 1], mask[:, : t + 1], past_key_values=cache).logits for t in range(5)]
    _close(torch.cat(steps[3:], 1)[1:], model(tokens[1:, 3:]).logits)
    _close(torch.cat(steps, 1)[:1], model(tokens[:1]).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_anywhere_is_not_seen(model: Any, use_cache: bool) -> None:
    tokens = torch.randint(2, 31, (4, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0]])
    logits = model(tokens, mask, use_cache=use_cache).logits
    for row, visible in enumerate(mask.bool()):
        _close(logits[row : row + 1, visible], model(tokens[row : row + 1, visible]).logits)
    texts = model.generate(tokens, attention_mask=mask, **GREEDY, use_cache=use_cache)
    for row, visible in enumerate(mask.bool()):
        alone = model.generate(tokens[row : row + 1, visible], **GREEDY)
        assert texts[row, 6:].tolist() == alone[0, visible.sum() :].tolist(), "also after padding on the right"


@pytest.mark.parametrize("room", [None, 24])
def test_a_padded_second_turn(model: Any, room: int | None) -> None:
    tokens = torch.randint(2, 31, (3, 11))
    mask = torch.tensor([[1] * 11, [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0]])
    cache = MoEMambaCache() if room is None else modeling.MoEMambaStaticCache(room)
    parts = [model(tokens[:, :5], mask[:, :5], cache=cache), model(tokens[:, 5:9], mask[:, :9], cache=cache)]
    parts.append(model(tokens[:, 9:], mask, cache=cache))
    logits = torch.cat([part.logits for part in parts], 1)
    for row, visible in enumerate(mask.bool()):
        _close(logits[row : row + 1, visible], model(tokens[row : row + 1, visible]).logits)
    with pytest.raises(ValueError, match="a state cannot forget a token"):
        model(tokens[:, :1], torch.ones(3, 12), cache=cache)


def test_a_pad_token_inside_a_text_is_text(model: Any) -> None:
    prompt = torch.tensor([[5, 1, 7, 3], [8, 9, 1, 6]])  # 1 is config.pad_token_id
    ones = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, **GREEDY), model.generate(prompt, attention_mask=ones, **GREEDY))
    padded = torch.tensor([[1, 1, 7, 4]])
    mask = torch.tensor([[0, 0, 1, 1]])
    assert torch.equal(model.generate(padded, **GREEDY), model.generate(padded, attention_mask=mask, **GREEDY))


def test_a_static_cache_gives_the_same_text(model: Any) -> None:
    prompt, mask = torch.randint(2, 31, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for keys in ({}, {"num_beams": 3}, {"attention_mask": mask}):
        static = model.generate(prompt, cache_implementation="static", **GREEDY, **keys)
        assert torch.equal(static, model.generate(prompt, **GREEDY, **keys))
    cache = modeling.MoEMambaStaticCache(8)
    whole = model(prompt).logits
    for _ in range(2):
        places = [tensor.data_ptr() for tensor in cache.tensors() if tensor.dim()]
        _close(model(prompt[:, :3], cache=cache).logits, whole[:, :3])
        _close(model(prompt[:, 3:], cache=cache).logits, whole[:, 3:])
        assert places in ([], [tensor.data_ptr() for tensor in cache.tensors() if tensor.dim()])
        cache.reset()
    with pytest.raises(ValueError, match="room for 8 tokens, holds 0 and gets 10 more"):
        model(torch.cat((prompt, prompt), 1), cache=cache)


def test_beams_reorder_the_states(model: Any) -> None:
    prompt = torch.randint(2, 31, (2, 5))
    keys = {**GREEDY, "num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (model.generate(prompt, **keys, use_cache=wanted) for wanted in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    _close(cached.sequences_scores, uncached.sequences_scores)
    moves = [b[:, step] != torch.arange(len(b)) for b in [uncached.beam_indices] for step in range(6)]
    assert torch.stack(moves).any(), "some beam was taken up by another, else nothing is shown"


def test_generate_continues_from_a_returned_cache(model: Any) -> None:
    prompt, more = torch.randint(2, 31, (2, 5)), torch.randint(2, 31, (2, 3))
    first = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, more), 1)
    seen = first.past_key_values.get_seq_length()
    assert seen == first.sequences.shape[1] - 1
    kept, mask = copy.deepcopy(first.past_key_values), torch.ones_like(longer)  # the text may have the padding's id
    calls: list[int] = []
    handle = model.model.embedding.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    continued = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    handle.remove()
    assert calls[0] == 4, "what the cache has seen is not read again"
    assert torch.equal(continued, model.generate(longer, attention_mask=mask, **GREEDY))
    new = torch.cat((first.sequences[:, -1:], more), 1)  # only the new tokens, under a mask of all
    again = model.generate(new, attention_mask=mask, past_key_values=kept, **GREEDY)
    assert torch.equal(again[:, 4:], continued[:, longer.shape[1] :])


def test_sampling_is_reproducible_from_a_seed(model: Any) -> None:
    keys = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "top_p": 0.9, "eos_token_id": None}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(torch.full((3, 2), 5), **keys))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rows_that_end_are_filled_with_padding(model: Any) -> None:
    prompt = torch.randint(2, 31, (3, 4))
    free = model.generate(prompt, **GREEDY)
    end = int(free[0, 5])
    out = model.generate(prompt, **{**GREEDY, "eos_token_id": end})
    first = (free[0, 4:] == end).nonzero()[0].item()
    assert out[0, 4 + first] == end
    assert (out[0, 5 + first :] == 1).all()


def test_the_cache_repeats_selects_and_forgets(model: Any) -> None:
    tokens = torch.randint(2, 31, (2, 5))
    cache = model(tokens).past_key_values
    assert (len(cache), cache.batch_size, cache.get_seq_length(1)) == (model.config.stack.updates, 2, 5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    rows = tokens[[1, 0, 0]]
    following = torch.randint(2, 31, (3, 2))
    whole = model(torch.cat((rows, following), 1)).logits[:, -2:]
    _close(model(following, past_key_values=cache).logits, whole)
    for action in (lambda: cache.crop(-1), lambda: model.generate(tokens, prompt_lookup_num_tokens=2, **GREEDY)):
        with pytest.raises(ValueError, match=r"cannot forget|stateful models"):
            action()
    cache.reset()
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (0, -1, 0, -1)
    _close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_states_have_a_constant_size_but_for_attention(pair: Pair) -> None:
    for pattern, grows in (("M", False), ("ME", False), ("M*", True)):
        _, model = pair(pattern)
        short, long = (model(torch.randint(31, (1, length))).past_key_values for length in (3, 40))
        assert (sum(t.nbytes for t in long.tensors()) > sum(t.nbytes for t in short.tensors())) == grows


def test_the_text_may_be_given_as_embeddings(model: Any) -> None:
    prompt = torch.randint(2, 31, (2, 5))
    from_embeddings = model.generate(inputs_embeds=model.model.embedding(prompt), **GREEDY)
    assert torch.equal(from_embeddings, model.generate(prompt, **GREEDY)[:, 5:])


def test_expert_choice_does_not_generate(pair: Pair) -> None:
    _, model = pair("ME", {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none"})
    tokens = torch.randint(31, (1, 4))
    assert model(tokens).past_key_values is None
    for action in (
        lambda: model.generate(tokens, **GREEDY),
        lambda: model.generate(tokens, **GREEDY, use_cache=False),
        lambda: model(tokens, use_cache=True),
        lambda: model(tokens, past_key_values=MoEMambaCache()),
    ):
        with pytest.raises(ValueError, match="expert_choice looks ahead") as error:
            action()
        assert "\n" not in str(error.value)


def test_another_kind_of_cache_is_refused(pair: Pair) -> None:
    _, model = pair("M")
    prompt = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="cache_implementation=quantized: a MoEMambaCache is only dynamic or static"):
        model.generate(prompt, cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match="was passed with a cache: pass only one"):
        model.generate(prompt, cache=MoEMambaCache(), cache_implementation="static", **GREEDY)
