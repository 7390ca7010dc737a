"""A trained model as EleutherAI's evaluation harness wants one. Needs the package lm-eval."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import chunks, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe_mamba.config import Config
from moe_mamba.data.text_stream import TextStream
from moe_mamba.errors import UserError
from moe_mamba.kernels import cross_entropy
from moe_mamba.kernels.cross_entropy import IGNORED
from moe_mamba.model.generation import read, select
from moe_mamba.model.mixers.base import State
from moe_mamba.model.pattern import depends_on_batch, looks_ahead
from moe_mamba.model.sampling import Sampling
from moe_mamba.parallel.generation import start_writing
from moe_mamba.run.restore import Restored

T = TypeVar("T")
CHUNK = 2048  # tokens of all sequences in one pass; states carry over to the next
LOGITS = 1 << 26  # that exist at once
DRAWING = {"temperature", "top_k", "top_p"}  # what a task may ask of the draws; do_sample is in temperature


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether each of its tokens is the most probable one."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after a shared context.

    Attributes:
        number: of the request.
        inputs: the tokens before each target; the first stands right behind the context.
        targets: as many.
    """

    number: int
    inputs: list[int]
    targets: list[int]


def check_likelihood(config: Config) -> None:
    """Refuse models whose loss on a text is not the likelihood of that text.

    Raises:
        UserError: experts choose among later tokens, or a capacity makes a token depend on the rest of its batch.
    """
    if looks_ahead(config.model, config.moe):
        raise UserError(
            "moe.router=expert_choice looks ahead at later tokens, so it gives no likelihoods and cannot generate: "
            "score text with --input, or train with moe.router=switch or top_k"
        )
    if depends_on_batch(config.model, config.moe):
        raise UserError(
            f"moe.evaluation_capacity={config.moe.evaluation_capacity} drops a token by what else is in its batch, so "
            "a request has no likelihood of its own: score text with --input, or train with it null"
        )


class HarnessModel(TemplateLM):
    """Log-likelihoods and texts for the harness, in the order asked.

    Requests that share a context, such as the choices of a question, share one pass over it: each goes on from its
    states. Contexts of several lengths are padded on the left and start behind the padding, as a document does, so
    nothing sees it; continuations are padded on the right, which causality hides. A request's score is therefore
    what it would be by itself.

    **The first token of a document.** Where the tokenizer puts BOS before every text, so it is here, and a text without
    a context has BOS for one; else a text without a context is given end-of-text, as the harness does for every causal
    model. A run without `data.reset_at_document` has learned what follows an end-of-text, and is asked
    just that. A run with it has not learned this: the token after an end-of-text is no target there, end-of-text is
    never an input that a loss reaches, and a document begins from the empty state. So that its other tokens are scored
    as they were trained, such a text begins from the empty state too, and its first token costs
    log(model.vocab_size): the uniform distribution, a likelihood still, and the same for every choice of a question.

    Attributes:
        max_length: tokens that the model reads at once; of a longer context the last ones count. Nothing in the model
            limits it.
        asked: requests so far, but for whole texts.
        truncated: those of them whose context was longer.
    """

    def __init__(self, restored: Restored, *, batch: int, max_length: int) -> None:
        """Wrap a restored model.

        Args:
            restored: model, tokenizer and config.
            batch: sequences at once.
            max_length: see above.

        Raises:
            UserError: see `check_likelihood`.
        """
        super().__init__()
        check_likelihood(restored.config)
        self._model, self._tokens, self._config = restored.model.eval(), restored.tokenizer, restored.config
        self._device, self._topology = restored.model.embedding.weight.device, restored.topology
        self._screen = sys.stderr  # the harness runs with another one, see `harness_tasks.run_tasks`
        self.batch, self.max_length = batch, max_length
        self.asked = self.truncated = 0

    def lead(self, ask: Callable[[], T]) -> T | None:
        """Run the harness, as ``ask`` does, on this model; of several ranks only the first runs it."""
        return ask()

    @property
    def eot_token_id(self) -> int:
        """Id of end-of-text."""
        return self._tokens.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """Id before a text without a context: BOS where there is one, else end-of-text, as in the harness' own."""
        return self._tokens.beginning

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task does not say how many, as in the harness's own models."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind what the tokenizer puts before every text, unless ``add_special_tokens`` is False."""
        (ids,) = self._tokens.encode_prompts([string])
        return self._tokens.without_prefix(ids) if add_special_tokens is False else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Score (context, continuation) pairs."""
        self.asked += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens, each token predicted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append(((), *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score.log_probability
        return totals

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness splits the tokens of both, but for a continuation that melts into the context's last token."""
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Score]:
        """Score (texts, tokens of the context, tokens of the continuation)."""
        scores = [Score(0.0, True)] * len(requests)
        shared: dict[tuple[int, ...], list[Continuation]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) > self.max_length + 1:
                context = context[-max(1, self.max_length + 1 - len(continuation)) :]
                self.truncated += 1
            context = context or [self.prefix_token_id]
            if context == [self.eot_token_id] and self._config.data.reset_at_document and continuation:
                scores[number] = Score(-torch.tensor(self._model.config.vocab_size).double().log().item(), False)
                context, continuation = continuation[:1], continuation[1:]
            if continuation:  # a text of no token is certain
                # The context's last token is read with the continuation: its prediction is the first that counts.
                inputs = [context[-1], *continuation[:-1]]
                shared[tuple(context[:-1])].append(Continuation(number, inputs, continuation))
        with self._bar(sum(map(len, shared.values())), "scoring") as bar:
            for found in self._score(shared):
                for number, score in found.items():
                    first = scores[number]
                    both = first.log_probability + score.log_probability, first.is_greedy and score.is_greedy
                    scores[number] = Score(*both)
                bar.update(len(found))
        return scores

    def _score(self, shared: dict[tuple[int, ...], list[Continuation]]) -> Iterator[dict[int, Score]]:
        """Score what stands behind each context, in batches; the longest first, so that memory fails early."""
        ordered = sorted(filter(None, shared), key=len, reverse=True)
        for contexts in [*chunks(ordered, self.batch), *([[()]] if () in shared else [])]:
            # Of one token no context is left here.
            states = read(self._model, contexts)[1] if contexts[0] else self._model.initial_states(1)
            rows = [(place, each) for place, context in enumerate(contexts) for each in shared[context]]
            rows.sort(key=lambda row: len(row[1].inputs), reverse=True)
            for some in chunks(rows, self.batch):
                places = torch.tensor([place for place, _ in some], device=self._device)
                yield self._continue(select(states, places), [each for _, each in some])

    def _continue(self, states: list[State | None], rows: list[Continuation]) -> dict[int, Score]:
        """Score one continuation a row, each from its state."""
        length = max(len(row.inputs) for row in rows)
        tokens = torch.full((len(rows), length), self.eot_token_id)
        targets = torch.full((len(rows), length), IGNORED)
        for number, row in enumerate(rows):
            tokens[number, : len(row.inputs)] = torch.tensor(row.inputs)
            targets[number, : len(row.targets)] = torch.tensor(row.targets)
        tokens, targets = tokens.to(self._device), targets.to(self._device)
        losses = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        misses = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
        width = max(1, CHUNK // len(rows))
        for part, wanted in zip(tokens.split(width, 1), targets.split(width, 1), strict=True):
            hidden, _, new = self._model.hidden(part, states=states)
            assert new is not None
            states = new
            counted = (wanted != IGNORED).flatten().nonzero().flatten()  # rows of the stream
            for some in counted.split(max(1, LOGITS // self._model.config.vocab_size)):
                logits = self._model.gather_logits(self._model.logits(hidden[some]))  # (tokens, vocab)
                target = wanted.flatten()[some]
                loss = cross_entropy(logits, target, backend=self._model.kernels)
                owner = some // wanted.shape[1]
                losses.index_add_(0, owner, loss.double())
                misses.index_add_(0, owner, (logits.argmax(-1) != target).long())
        figures = zip(rows, losses.tolist(), misses.tolist(), strict=True)
        return {row.number: Score(-loss, missed == 0) for row, loss, missed in figures}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context as its task says; the prompt is the context's last `max_length` tokens.

        Raises:
            UserError: a task asks for a way to draw that generation does not know.
        """
        self.asked += len(requests)
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        with self._bar(len(requests), "writing") as bar:
            for numbers in alike.values():
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                for some in chunks(numbers, self.batch):
                    prompts = [self._prompt(requests[number].args[0]) for number in some]
                    for number, text in zip(some, self._write(prompts, settings, seed=some[0]), strict=True):
                        texts[number] = text
                    bar.update(len(some))
        return texts

    def _prompt(self, context: str) -> list[int]:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(tokens) > self.max_length
        return tokens[-self.max_length :]

    def _write(self, prompts: list[list[int]], settings: Mapping[str, Any], seed: int) -> list[str]:
        """New text behind each prompt, without the string that ended it."""
        unknown = settings.keys() - DRAWING - {"until", "max_gen_toks", "do_sample"}
        if unknown:
            raise UserError(
                f"generation_kwargs: {min(unknown)} is unknown: remove it from the task's file; "
                f"supported are {', '.join(sorted(DRAWING))}, do_sample, until and max_gen_toks"
            )
        draws = {
            "temperature": settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            "top_k": settings.get("top_k") or None,  # 0 is the harness's word for all
            "top_p": settings.get("top_p", 1.0),
        }
        until = [end for end in settings["until"] if end]
        streams = [TextStream(self._tokens, self._tokens.without_prefix(prompt), until) for prompt in prompts]
        seeds = range(seed, seed + len(prompts))
        writing = start_writing(
            self._model, self._topology, prompts, Sampling(**draws), seeds, end_of_text=self.eot_token_id
        )
        texts = [""] * len(prompts)
        for _ in range(settings["max_gen_toks"]):
            for row, token in writing.step().items():
                texts[row] += streams[row].push(token)
            writing.stop([row for row in writing.rows if streams[row].is_stopped])
        # What of the prompt was held back for its last character came with the new text.
        return [(text + stream.end()).removeprefix(stream.rest) for text, stream in zip(texts, streams, strict=True)]

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, file=self._screen, disable=None, leave=False, unit="")
