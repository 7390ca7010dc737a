"""Write text with a trained model."""

import json as json_format
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_mamba.config import NonNegative, Positive
from moe_mamba.data.text_stream import TextStream
from moe_mamba.errors import UserError
from moe_mamba.model.generation import Writing
from moe_mamba.model.sampling import Sampling
from moe_mamba.run.restore import restore


def main(
    checkpoint: str,
    prompt: str | None = None,
    prompts_file: str | None = None,
    max_new_tokens: Positive = 100,
    min_new_tokens: NonNegative = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    stop: str | None = None,
    batch: Positive = 16,
    json: bool = False,
    timing: bool = False,
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
        batch: prompts that are continued at once.
        json: print one JSON object a prompt instead, with prompt, text, tokens, and what ended it.
        timing: tell the speed of reading and of writing on standard error.
    """
    prompts = _prompts(prompt, prompts_file)
    stops, sampling = _stops(stop), Sampling(temperature, top_k, top_p)
    restored = restore(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = restored.tokenizer.encode_batch(prompts)
    texts = [
        _Text(text, ids, seed + place, TextStream(restored.tokenizer, ids, stops), restored.tokenizer.decode(ids))
        for place, (text, ids) in enumerate(zip(prompts, tokens, strict=True))
    ]
    screen = _Screen(texts, is_numbered=prompts_file is not None, is_json=json)
    speed = _Speed()
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        writing = Writing(
            restored.model,
            [text.tokens for text in part],
            sampling,
            [text.seed for text in part],
            end_of_text=restored.tokenizer.end_of_text,
            min_new_tokens=min_new_tokens,
        )
        _write(writing, part, max_new_tokens, screen, speed)
    if timing:
        print(speed, file=sys.stderr)


@dataclass
class _Text:
    """A prompt, and what has become of it."""

    prompt: str
    tokens: list[int]
    seed: int
    stream: TextStream
    text: str  # that is certain so far, the prompt's too
    new: list[int] = field(default_factory=list)
    ended_by: str | None = None

    def add(self, token: int) -> None:
        self.new.append(token)
        self.text += self.stream.push(token)
        if self.stream.is_stopped:
            self.ended_by = "stop"

    def end(self, by: str) -> None:
        self.text += self.stream.end()
        self.ended_by = "stop" if self.stream.is_stopped else by

    def as_json(self) -> str:
        return json_format.dumps(
            {"prompt": self.prompt, "text": self.text, "tokens": self.new, "ended_by": self.ended_by}
        )


class _Screen:
    """Shows the texts one after the other; the one whose turn it is as it grows."""

    def __init__(self, texts: list[_Text], is_numbered: bool, is_json: bool) -> None:
        self._texts, self._is_numbered, self._is_json = texts, is_numbered, is_json
        self._turn, self._shown = 0, 0  # the first text that is not over, and how much of it stands there

    def update(self) -> None:
        """Show what is new."""
        while self._turn < len(self._texts):
            text = self._texts[self._turn]
            if self._is_json:
                if text.ended_by is None:
                    return
                print(text.as_json(), flush=True)
            else:
                head = f"[{self._turn + 1}] " if self._is_numbered and not self._shown else ""
                end = "" if text.ended_by is None else "\n"
                print(head + text.text[self._shown :], end=end, flush=True)
                self._shown = len(text.text)
                if text.ended_by is None:
                    return
            self._turn, self._shown = self._turn + 1, 0


@dataclass
class _Speed:
    """Tokens and seconds of all batches, of reading prompts and of the steps after the first."""

    read: int = 0
    reading: float = 0.0
    written: int = 0
    writing: float = 0.0

    def __str__(self) -> str:
        lines = [f"read {self.read:,} tokens in {self.reading:.2f} s: {self.read / self.reading:,.0f} tokens/s"]
        if self.written:
            rate = f"{self.written / self.writing:,.1f} tokens/s"
            lines.append(f"wrote {self.written:,} tokens in {self.writing:.2f} s: {rate}")
        return "\n".join(lines)


def _write(writing: Writing, texts: list[_Text], most: int, screen: _Screen, speed: _Speed) -> None:
    """Write the texts of a batch to their ends."""
    speed.read += sum(len(text.tokens) for text in texts)
    for number in range(most):
        start = time.perf_counter()
        going = writing.rows
        drawn = writing.step()
        elapsed = time.perf_counter() - start
        if number == 0:
            speed.reading += elapsed
        else:
            speed.writing += elapsed
            speed.written += len(going)
        for row in going:
            if row in drawn:
                texts[row].add(drawn[row])
            else:
                texts[row].end("end_of_text")
        writing.stop([row for row in writing.rows if texts[row].ended_by])
        screen.update()
        if not writing.rows:
            return
    for row in writing.rows:
        texts[row].end("length")
    screen.update()


def _prompts(prompt: str | None, path: str | None) -> list[str]:
    """The prompts that the user gave, by hand or in a file."""
    if (prompt is None) == (path is None):
        raise UserError("give --prompt, or --prompts_file with one prompt per line")
    if prompt is not None:
        return [prompt]
    assert path is not None
    try:
        content = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts_file={path} cannot be read ({why}): give a text or .jsonl file") from error
    lines = {number: line for number, line in enumerate(content.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"--prompts_file={path} has no prompts: write one per line")
    if not path.endswith(".jsonl") and not (path == "-" and content.lstrip().startswith("{")):
        return [line.removesuffix("\r") for line in lines.values()]
    found = []
    for number, line in lines.items():
        try:
            text = json_format.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
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
