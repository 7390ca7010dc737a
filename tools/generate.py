"""Write text with a trained model."""

import json as json_format
import sys

import torch

from moe_mamba.command_line import run_command
from moe_mamba.model.generation import generate
from moe_mamba.train.restore import restore


def main(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Continue a prompt; the text appears as it is written. Time and memory a token do not grow with the text.

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
    tokens = tokenizer.encode(str(prompt))
    shown = tokenizer.decode(tokens)
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
        print(json_format.dumps({"prompt": str(prompt), "text": text, "tokens": new}))
        return
    sys.stdout.write(shown)
    text = shown
    for token in drawn:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        # A character of several byte tokens shows as a replacement character until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print(text[len(shown) :])


if __name__ == "__main__":
    run_command(main)
