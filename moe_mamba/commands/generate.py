"""Write text with a trained model."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

from moe_mamba.command_line import run_command
from moe_mamba.config_types import Fraction, LocalRank, NonNegative, OptionalPositive, Positive, Range, Seed
from moe_mamba.errors import UserError
from moe_mamba.model.sampling import Sampling
from moe_mamba.parallel.distributed import limit_collectives, on_first
from moe_mamba.run.inference import joined, layout_from, restore_in_layout
from moe_mamba.run.writing import TextScreen, start_texts, write_all


def main(
    checkpoint: str,
    prompt: str | None = None,
    prompts_file: str | None = None,
    max_new_tokens: Positive = 100,
    min_new_tokens: NonNegative = 0,
    temperature: Annotated[float, Range(0, 1e6)] = 0.8,
    top_k: OptionalPositive = None,
    top_p: Fraction = 0.95,
    seed: Seed = 0,
    stop: str | None = None,
    batch: Positive = 16,
    json: bool = False,
    timing: bool = False,
    local_rank: LocalRank = None,
    **overrides: Any,
) -> None:
    """Continue a prompt, or many; the text appears as it is written.

    Time and memory per token do not grow with the text, but in models with attention. Of many prompts each text begins
    with its number in brackets, and they come in the order of the prompts.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        prompt: text to continue.
        prompts_file: texts to continue, one per line, or as JSON lines {"prompt": "..."} in a .jsonl file; - reads
            standard input (JSON lines, where the first begins with a brace).
        max_new_tokens: tokens to write at most; an end-of-text token ends the text before.
        min_new_tokens: end-of-text is not drawn before so many tokens.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: draw from only this many of the most probable tokens.
        top_p: draw from only the most probable tokens that together have this probability.
        seed: the same seed gives the same text; the second prompt's is one more, and so on, whatever the batch.
        stop: a string that ends the text, which is not shown; several as a JSON list, such as '["Q:", "END"]'.
        batch: prompts that are continued at once, over all processes.
        json: print one JSON object a prompt instead, with prompt, text, tokens, and what ended it.
        timing: tell the speed of reading and of writing on standard error.
        local_rank: launchers add it; the environment says the same.
        overrides: under a launcher, how its processes share the model: --parallel.tensor=2, --parallel.expert=4,
            --parallel.expert_tensor=true; --parallel.timeout.
    """
    stops, sampling, layout = _stops(stop), Sampling(temperature, top_k, top_p), layout_from(overrides)
    with joined(local_rank) as world:
        prompts = on_first(lambda: _prompts(prompt, prompts_file))
        restored = restore_in_layout(checkpoint, layout, world)
        limit_collectives(restored.config.parallel.timeout)
        texts = start_texts(restored.tokenizer, prompts, seed, stops)
        screen = TextScreen(texts if world.is_first else [], is_numbered=prompts_file is not None, is_json=json)
        speed = write_all(restored, texts, sampling, batch, min_new_tokens, max_new_tokens, screen)
        if timing and world.is_first:
            print(speed, file=sys.stderr)


def _prompts(prompt: str | None, path: str | None) -> list[str]:
    """The prompts that the user gave, by hand or in a file."""
    if (prompt is None) == (path is None):
        raise UserError("give --prompt, or --prompts_file with one prompt per line")
    if prompt is not None:
        return [prompt]
    assert path is not None
    try:
        content = sys.stdin.buffer.read().decode("utf-8") if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts_file={path} cannot be read ({why}): give a text or .jsonl file") from error
    content = content.removeprefix("\ufeff")  # a byte order mark
    lines = {number: line for number, line in enumerate(content.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"--prompts_file={path} has no prompts: write one per line")
    if not path.endswith(".jsonl") and not (path == "-" and content.lstrip().startswith("{")):
        return [line.removesuffix("\r") for line in lines.values()]
    found = []
    for number, line in lines.items():
        try:
            text = json_format.loads(line)["prompt"]
            str(text).encode()  # half of a surrogate pair is no text
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not text or not isinstance(text, str):
            raise UserError(f'--prompts_file={path}, line {number}: write {{"prompt": "some text"}}')
        found.append(text)
    return found


def _stops(stop: str | None) -> list[str]:
    """The stop strings: a JSON list of them, or one as it stands."""
    if stop is None:
        return []
    if not stop:
        raise UserError("--stop is empty and would end every text at once: give a string, or leave it out")
    try:
        stops = json_format.loads(stop)
    except ValueError:
        return [stop]
    is_list = isinstance(stops, list) and stops and all(isinstance(one, str) and one for one in stops)
    return stops if is_list else [stop]


if __name__ == "__main__":
    run_command(main)
