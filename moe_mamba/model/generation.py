"""Recurrent generation: one parallel pass over the prompt, then a token at a time from the states.

Time and memory of a token are constant for Mamba, feed-forward layers and experts; attention's grow with the text.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel, State


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: Generator) -> int:
    """Draw a token.

    Args:
        logits: (vocab,) on the CPU.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only this many of the likeliest tokens are drawn from; None: all.
        top_p: only the likeliest tokens that together have this probability are drawn from (Holtzman et al., 2020).
        generator: on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits.float() / temperature).sort(descending=True, stable=True)
    probability = logits[:top_k].softmax(dim=-1)
    # A token stays while those before it have less than top_p: so the first always does.
    probability[probability.cumsum(0) - probability >= top_p] = 0
    return int(tokens[torch.multinomial(probability, 1, generator=generator)])


def _check(model: LanguageModel, prompt: Sequence[int], temperature: float, top_k: int | None, top_p: float) -> None:
    if "E" in model.config.layers and model.moe_config.router == "expert_choice":
        raise UserError(
            "moe.router=expert_choice looks ahead at later tokens, so it cannot generate: "
            "train with moe.router=switch or top_k"
        )
    if not prompt:
        raise UserError("the prompt has no tokens: give some text")
    outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
    if outside:
        raise UserError(
            f"the prompt has token {outside[0]}, past model.vocab_size={model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative: give 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} leaves no token: give 1 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is not a probability: give more than 0 and at most 1")


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yield new tokens as they are drawn, and stop before ``end_of_text`` or after ``max_new_tokens``.

    Args:
        model: put into evaluation mode, in which experts drop no token; a step then equals the parallel pass.
        prompt: at least one token.
        max_new_tokens: how many tokens at most.
        temperature: see ``sample``, as for ``top_k`` and ``top_p``.
        top_k: see ``sample``.
        top_p: see ``sample``.
        seed: of the draws; the same seed gives the same text.
        end_of_text: token that ends the text; None: none does.

    Raises:
        UserError: at the call, not at the first token: expert choice, an empty prompt, a setting out of range.
    """
    _check(model, prompt, temperature, top_k, top_p)
    model.eval()
    generator = Generator("cpu").manual_seed(seed)

    @torch.no_grad()
    def stream() -> Iterator[int]:
        device = model.embedding.weight.device
        states: list[State] | None = model.initial_states(1)
        tokens = torch.tensor([list(prompt)], device=device)  # (1, length)
        for _ in range(max_new_tokens):
            hidden, _, states = model.hidden(tokens, states=states)
            token = sample(model.logits(hidden[-1:])[0].cpu(), temperature, top_k, top_p, generator)
            if token == end_of_text:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)

    return stream()
