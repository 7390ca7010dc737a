"""Text of tokens as they come: only what no later token changes, and nothing of a stop string.

What has come equals decoding everything, for every tokenizer. A token decodes itself and a few others: text is decoded
from a final place (see ``finality``) before the last one, and only where the next final place is reached; with stop
strings also behind each character of a run of byte tokens. Only decoders of which nothing is known to be local are
decoded as a whole: once at the end, and with stop strings at each token.
"""

from collections.abc import Sequence

from moe_mamba.data.finality import Place
from moe_mamba.data.library_calls import DecodingError
from moe_mamba.data.tokenizer import Tokenizer


class TextStream:
    """The text of one row of tokens as it grows: ``beginning``, all that ``push`` gives, and ``end`` are all of it.

    Args:
        tokenizer: of the tokens.
        prompt: tokens before those that come; stop strings in their text stay.
        stops: strings that end the text, none of them empty. What may be the beginning of one is held back until it is
            known to be none.

    Attributes:
        beginning: the prompt's text as far as no token changes it.
        rest: the prompt's text behind that, as it would be if no token came; ``push`` or ``end`` gives it.
        is_stopped: a stop string has come: the text is over, right before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._stops = stops
        self._finality = tokenizer.finality()
        self._final = _Window(tokenizer)
        self._guess: _Window | None = None  # from the last character of a run of byte tokens
        self._guessed = ""  # text behind the last final place, as it is so far
        self._held = ""
        last = 0
        for token in prompt:
            place = self._finality.push(token)
            if place is not Place.NOTHING:
                self._final.tokens.append(token)
            if place is Place.FINAL:
                last = len(self._final.tokens)
        behind = self._final.tokens[last:]
        del self._final.tokens[last:]
        self.beginning = self._final.take()
        self._final.tokens += behind
        self.rest = self._unsearched = self._so_far() if behind else ""

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        place = self._finality.push(token)
        if place is Place.NOTHING:
            return ""
        self._final.tokens.append(token)
        if self._guess is not None:
            self._guess.tokens.append(token)
        if place is Place.FINAL:
            self._guess, self._guessed = None, ""
            return self._release(self._final.take())
        return self._stop_so_far() if place is Place.SO_FAR and self._stops else ""

    def end(self) -> str:
        """What was held back, now that no token comes any more."""
        if self.is_stopped:
            return ""
        text = self._release(self._final.text())
        rest, self._held = self._held, ""
        return text + rest

    def _stop_so_far(self) -> str:
        """Look for a stop string in the text as it is so far; up to it, if there is one: a stop makes it final."""
        if not self._finality.is_local:
            self._guessed = self._so_far()
        else:
            self._guess = self._guess or self._final.copy()
            self._guessed += self._guess.take()
        text = self._held + self._guessed
        place = self._first_stop(text, _alike(self._unsearched, text))
        if place is None:
            return ""
        self.is_stopped = True
        return text[:place]

    def _so_far(self) -> str:
        """Text behind the last final place if no token came."""
        try:
            return self._final.text()
        except DecodingError:  # of these tokens alone
            return ""

    def _first_stop(self, text: str, start: int = 0) -> int | None:
        return min((place for stop in self._stops if (place := text.find(stop, start)) >= 0), default=None)

    def _release(self, text: str) -> str:
        """Add ``text`` to what is held back, and let go what belongs to no stop string."""
        known = _alike(self._unsearched, text)  # of the prompt
        prompt, text = text[:known], text[known:]
        self._unsearched = ""
        self._held += text
        place = self._first_stop(self._held)
        if place is not None:
            self.is_stopped = True
            certain, self._held = self._held[:place], ""
            return prompt + certain
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        place = len(self._held) - kept
        certain, self._held = self._held[:place], self._held[place:]
        return prompt + certain


class _Window:
    """The last tokens of a row: some before a place whose text is known, and those behind it.

    Attributes:
        tokens: from a final place on. A decoder may treat the first token of a text in its own way, and leave out
            spaces there: so those before the place have a text that is not empty, or are all that there are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self._places = [0]  # final ones, the last of them the place
        self._before = ""  # text of the tokens before it

    def copy(self) -> "_Window":
        """One that goes on by itself."""
        other = _Window(self._tokenizer)
        other.tokens, other._places, other._before = [*self.tokens], [*self._places], self._before
        return other

    def text(self) -> str:
        """Of the tokens behind the place."""
        return self._tokenizer.decode(self.tokens)[len(self._before) :]

    def take(self) -> str:
        """Of the tokens behind the place, which is behind them all from now on."""
        text = self.text()
        for back in (1, 2, 4, 8):  # the fewest tokens that have a text by themselves
            start = self._places[-back] if back <= len(self._places) else 0
            if before := self._tokenizer.decode(self.tokens[start:]):
                break
        else:
            start, before = 0, self._before + text
        del self.tokens[:start]
        self._places = [place - start for place in self._places if place >= start] + [len(self.tokens)]
        self._before = before
        return text


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((count for count, (left, right) in pairs if left != right), min(len(one), len(other)))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
