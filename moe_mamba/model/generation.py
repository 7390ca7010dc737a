"""Recurrent generation: passes over the prompts in chunks, then a token at a time from the states.

Time and memory of a token are constant for Mamba, feed-forward layers and experts; attention's grow with the text.
Prompts of different lengths go in one batch: the shorter ones stand behind padding, and a document start at their
first token hides it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.base import State
from moe_mamba.model.pattern import depends_on_batch, looks_ahead
from moe_mamba.model.sampling import Sampling

CHUNK = 2048  # tokens of all prompts that a pass reads: what its activations take does not depend on the prompts
PADDING = 0  # any token would do


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
        temperature: see ``Sampling``, as for ``top_k`` and ``top_p``.
        top_k: see ``Sampling``.
        top_p: see ``Sampling``.
        seed: of the draws; the same seed gives the same text.
        end_of_text: token that ends the text; None: none does.

    Raises:
        UserError: at the call, not at the first token: expert choice, an empty prompt, a setting out of range.
    """
    writing = Writing(model, [prompt], Sampling(temperature, top_k, top_p), [seed], end_of_text=end_of_text)

    def stream() -> Iterator[int]:
        for _ in range(max_new_tokens):
            drawn = writing.step()
            if not drawn:
                return
            yield drawn[0]

    return stream()


class Writing:
    """Texts that grow side by side, one token per step; each is what its prompt would give by itself.

    Args:
        model: put into evaluation mode, in which experts drop no token; a step then equals the parallel pass.
        prompts: at least one, each of at least one token.
        sampling: how tokens are drawn.
        seeds: of each text's draws.
        end_of_text: token that ends a text; None: none does.
        min_new_tokens: ``end_of_text`` is not drawn before a text has as many.
        chunk: tokens of all prompts that a pass reads.
        length: tokens that prompts are padded to; None: as many as the longest has.

    Attributes:
        rows: texts that still grow, by their place in ``prompts``.

    Raises:
        UserError: expert choice, prompts without tokens or with tokens that the model does not know, or several prompts
            where experts have a capacity.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        end_of_text: int | None = None,
        min_new_tokens: int = 0,
        chunk: int = CHUNK,
        length: int | None = None,
    ) -> None:
        check_prompts(model, prompts)
        self.rows = list(range(len(prompts)))
        self._model = model.eval()
        self._sampling = sampling
        self._generators = [Generator("cpu").manual_seed(seed) for seed in seeds]
        self._end_of_text = end_of_text
        self._ends_after = 0 if end_of_text is None else min_new_tokens
        self._chunk, self._length = chunk, length
        self._unread: Sequence[Sequence[int]] = prompts
        self._states: list[State | None] = []
        self._last: list[int] = []  # the last token of each row
        self._steps = 0

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Draw a token for every text that still grows; the first step reads the prompts.

        Returns:
            Row -> token; a text that has come to its end is not in it, and not in ``rows`` any more.

        Raises:
            UserError: the model's logits are NaN or Inf.
        """
        if not self.rows:
            return {}
        device = self._model.embedding.weight.device
        if self._unread:
            stream, self._states = read(self._model, self._unread, self._chunk, self._length)
            self._unread = ()
        else:
            tokens = torch.tensor(self._last, device=device)[:, None]  # (rows, 1)
            stream, self._states = _advance(self._model, tokens, None, self._states)
        logits = self._model.gather_logits(self._model.logits(stream))  # (rows, vocab)
        if self._steps < self._ends_after:
            logits[:, self._end_of_text] = -torch.inf
        self._steps += 1
        self._last = self._sampling.draw(logits, [self._generators[row] for row in self.rows])
        drawn = dict(zip(self.rows, self._last, strict=True))
        over = [row for row, token in drawn.items() if token == self._end_of_text]
        self.stop(over)
        return {row: token for row, token in drawn.items() if row not in over}

    @torch.inference_mode()
    def stop(self, rows: Sequence[int]) -> None:
        """Let texts end: no further time is spent on them."""
        kept = [place for place, row in enumerate(self.rows) if row not in rows]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        self._last = [self._last[place] for place in kept]
        places = torch.tensor(kept, dtype=torch.int64, device=self._model.embedding.weight.device)
        self._states = select(self._states, places)


@torch.no_grad()
def read(
    model: LanguageModel, prompts: Sequence[Sequence[int]], chunk: int = CHUNK, length: int | None = None
) -> tuple[Tensor, list[State | None]]:
    """Read prompts, a chunk at a time.

    Args:
        model: in evaluation mode.
        prompts: at least one, each of at least one token.
        chunk: tokens of all prompts that a pass reads; a pass takes at least one of each.
        length: tokens that prompts are padded to; None: as many as the longest has.

    Returns:
        The stream after each prompt's last token, (prompts, d_model), for ``LanguageModel.logits``, and the states.
    """
    device = model.embedding.weight.device
    length = max(len(prompt) for prompt in prompts) if length is None else length
    tokens = torch.full((len(prompts), length), PADDING)
    document_starts = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        document_starts[row, length - len(prompt)] = len(prompt) < length
    states: list[State | None] = model.initial_states(len(prompts))
    width = max(1, chunk // len(prompts))
    for part, start in zip(tokens.split(width, dim=1), document_starts.split(width, dim=1), strict=True):
        stream, states = _advance(model, part.to(device), start.to(device) if start.any() else None, states)
    return stream, states


def select(states: Sequence[State | None], rows: Tensor) -> list[State | None]:
    """The states of some sequences of a batch, or of the same in another order: ``rows`` (count,) int64."""
    return [state and state.map_rows(lambda tensor: tensor.index_select(0, rows)) for state in states]


def _advance(
    model: LanguageModel, tokens: Tensor, document_starts: Tensor | None, states: list[State | None]
) -> tuple[Tensor, list[State | None]]:
    """One pass over tokens (rows, length): the stream after the last of each (rows, d_model), and the new states."""
    stream, _, new_states = model.hidden(tokens, document_starts, states)
    assert new_states is not None, "states were given"
    return stream.view(*tokens.shape, -1)[:, -1], new_states


def check_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse what a model cannot continue.

    Raises:
        UserError: see ``Writing``.
    """
    config, moe = model.config, model.moe_config
    if looks_ahead(config, moe):
        raise UserError(
            "moe.router=expert_choice looks ahead at later tokens, so it cannot generate: "
            "train with moe.router=switch or top_k"
        )
    if depends_on_batch(config, moe) and len(prompts) > 1:
        raise UserError(
            f"moe.evaluation_capacity={moe.evaluation_capacity:g} lets the texts of a batch displace each other's "
            "tokens: generate one at a time"
        )
    if not prompts:
        raise UserError("no prompts: give at least one")
    for number, prompt in enumerate(prompts, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise UserError(f"{which} has no tokens: give some text")
        outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
        if outside:
            raise UserError(
                f"{which} has token {outside[0]}, outside model.vocab_size={model.config.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
