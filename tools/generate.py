"""Write text with a trained model."""

import json as json_format
from collections.abc import Iterator

import torch

from moe_mamba.command_line import run_command
from moe_mamba.config import Positive
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.model.generation import generate
from moe_mamba.train.restore import restore

CONTEXT_TOKENS = 8


def main(
    checkpoint: str,
    prompt: str,
    max_new_tokens: Positive = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Continue a prompt; the text appears as it is written.

    Time and memory a token do not grow with the text, but in models with attention.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        prompt: text to continue.
        max_new_tokens: tokens to write at most; an end-of-text token ends the text before.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from this many of the likeliest tokens alone.
        top_p: draw from the likeliest tokens that together have this probability alone.
        seed: the same seed gives the same text.
        json: print one JSON object with prompt, text and tokens instead.
    """
    restored = restore(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = restored.tokenizer
    tokens = tokenizer.encode(prompt)
    drawn = generate(
        restored.model,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        end_of_text=tokenizer.end_of_text,
    )
    if json:
        new = list(drawn)
        text = tokenizer.decode([*tokens, *new])
        print(json_format.dumps({"prompt": prompt, "text": text, "tokens": new}))
        return
    for piece in stream_text(tokenizer, tokens, drawn):
        print(piece, end="", flush=True)
    print()


def stream_text(tokenizer: Tokenizer, prompt: list[int], drawn: Iterator[int]) -> Iterator[str]:
    """Text of the prompt, then of each token as soon as its characters are whole; a token decodes a few others."""
    tokens = list(prompt)
    yield tokenizer.decode(tokens)
    # Tokens before `begin` are never decoded again; those up to `shown` give the next ones their context.
    begin, shown = max(0, len(tokens) - CONTEXT_TOKENS), len(tokens)
    for token in drawn:
        tokens.append(token)
        text, known = tokenizer.decode(tokens[begin:]), tokenizer.decode(tokens[begin:shown])
        # A character of several byte tokens shows as a replacement character until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(known) :]
            begin, shown = max(begin, len(tokens) - CONTEXT_TOKENS), len(tokens)
    yield tokenizer.decode(tokens[begin:])[len(tokenizer.decode(tokens[begin:shown])) :]


if __name__ == "__main__":
    run_command(main)
