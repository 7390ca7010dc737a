"""Texts that a model continues, shown as they grow."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_mamba.data.text_stream import TextStream
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.model.generation import Writing
from moe_mamba.model.sampling import Sampling
from moe_mamba.parallel.generation import ShardedWriting, start_writing
from moe_mamba.run.restore import Restored


@dataclass
class Text:
    """A prompt, and what has become of it.

    Attributes:
        prompt: as it was given.
        tokens: of the prompt.
        seed: of its draws.
        stream: turns tokens into text.
        text: that is certain so far, the prompt's too.
        new: tokens that were written.
        ended_by: end_of_text, stop or length; None: it still grows.
    """

    prompt: str
    tokens: list[int]
    seed: int
    stream: TextStream
    text: str
    new: list[int] = field(default_factory=list)
    ended_by: str | None = None

    def add(self, token: int) -> None:
        """Write one more token."""
        self.new.append(token)
        self.text += self.stream.push(token)
        if self.stream.is_stopped:
            self.ended_by = "stop"

    def end(self, by: str) -> None:
        """End the text; what was held back for a stop string is shown."""
        self.text += self.stream.end()
        self.ended_by = "stop" if self.stream.is_stopped else by

    def as_json(self) -> str:
        """One line."""
        return json.dumps({"prompt": self.prompt, "text": self.text, "tokens": self.new, "ended_by": self.ended_by})


class TextScreen:
    """Shows the texts one after the other; the one whose turn it is as it grows."""

    def __init__(self, texts: list[Text], is_numbered: bool, is_json: bool) -> None:
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
class Speed:
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


def start_texts(tokenizer: Tokenizer, prompts: Sequence[str], seed: int, stops: Sequence[str]) -> list[Text]:
    """The texts that the prompts begin, with seeds from ``seed`` on; ``stops`` are strings that end them."""
    texts = []
    for place, (prompt, ids) in enumerate(zip(prompts, tokenizer.encode_prompts(prompts), strict=True)):
        stream = TextStream(tokenizer, tokenizer.without_prefix(ids), stops)  # BOS is read by the model, not shown
        texts.append(Text(prompt, ids, seed + place, stream, stream.beginning))
    return texts


def write_all(
    restored: Restored,
    texts: Sequence[Text],
    sampling: Sampling,
    batch: int,
    min_new_tokens: int,
    max_new_tokens: int,
    screen: TextScreen,
) -> Speed:
    """Write every text to its end, so many at once; every rank of a layout calls it, and knows all texts.

    Args:
        restored: the model, or this rank's part of it.
        texts: from ``start_texts``.
        sampling: how tokens are drawn.
        batch: texts at once.
        min_new_tokens: end-of-text is not drawn before so many.
        max_new_tokens: a text ends after so many.
        screen: shows them.

    Raises:
        UserError: see ``Writing``.
    """
    speed = Speed()
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        writing = start_writing(
            restored.model,
            restored.topology,
            [text.tokens for text in part],
            sampling,
            [text.seed for text in part],
            end_of_text=restored.tokenizer.end_of_text,
            min_new_tokens=min_new_tokens,
        )
        _write(writing, part, max_new_tokens, screen, speed)
    return speed


def _write(
    writing: Writing | ShardedWriting, texts: Sequence[Text], most: int, screen: TextScreen, speed: Speed
) -> None:
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
