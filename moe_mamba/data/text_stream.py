"""Text of tokens as they come: only whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from moe_mamba.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 8
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a character of several byte tokens shows as until it is whole


class TextStream:
    """The text of one sequence of tokens as it grows; a token decodes a few others.

    Args:
        tokenizer: of the tokens.
        prompt: tokens before those that come; their own text is ``decode(prompt)``, and stop strings in it stay.
        stops: strings that end the text, none of them empty. What may be the beginning of one is held back until it is
            known to be none.

    Attributes:
        is_stopped: a stop string has come: the text is over, right before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        # Tokens that came before `_known` are decoded to give the next ones their context.
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._known = len(self._tokens)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(INCOMPLETE):
            return ""
        self._tokens = self._tokens[-CONTEXT_TOKENS:]
        self._known = len(self._tokens)
        return self._release(text)

    def end(self) -> str:
        """What was held back, now that no token comes any more."""
        text = self._release(self._new_text())
        rest, self._held = self._held, ""
        return text + rest

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._tokens)[len(self._tokenizer.decode(self._tokens[: self._known])) :]

    def _release(self, text: str) -> str:
        """Add ``text`` to what is held back, and let go what belongs to no stop string."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        place = len(self._held) - kept
        certain, self._held = self._held[:place], self._held[place:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
