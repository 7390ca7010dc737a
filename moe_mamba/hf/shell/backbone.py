"""The model without a head: embedding, layers, norm."""

import difflib
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging

from moe_mamba.hf.shell.cache import CACHE, MoEMambaCache, StateCache
from moe_mamba.hf.shell.kernels import Plain, operations
from moe_mamba.hf.shell.order import reordered, reordered_attention, reordered_rows, run_with_waiting
from moe_mamba.hf.shell.padding import Reading, packed_document_starts, read
from moe_mamba.hf.shell.pretrained import MoEMambaLayer, MoEMambaPreTrainedModel
from moe_mamba.model.initialize import Initializer, embedding_weight
from moe_mamba.model.layer import initial_states, run_layers
from moe_mamba.model.mixers.base import State, Statistics
from moe_mamba.model.mixers.routing import Router
from moe_mamba.model.norm import build_norm
from moe_mamba.model.pattern import check_pattern, has_experts, layer_specs, looks_ahead
from moe_mamba.model.sequences import Recording, Sequences

logger = logging.get_logger(__name__)


@dataclass
class MoEMambaModelOutput(MoeModelOutputWithPast):
    """What a pass gives.

    Args:
        router_statistics: of each router by its name, beside ``router_logits``.
    """

    router_statistics: Statistics | None = None


DOCUMENTS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""Keywords that packing collators give."""


def _check_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Refuse inputs that are no batch of texts."""
    given, name, axes = input_ids, "input_ids", "(batch, length)"
    if inputs_embeds is not None:
        given, name, axes = inputs_embeds, "inputs_embeds", "(batch, length, d_model)"
    assert given is not None
    if given.dim() != axes.count(",") + 1 or 0 in given.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, and must be {axes}, with at least one token")


def _nearest(keyword: str) -> str:
    """A hint at what may be meant by a keyword that is unknown."""
    known = [*inspect.signature(MoEMambaModel.forward).parameters, "labels", "logits_to_keep", "shift_labels"]
    near = difflib.get_close_matches(keyword, known, 1)
    return f": did you mean {near[0]}?" if near else ""


class MoEMambaModel(MoEMambaPreTrainedModel):
    """The residual stack without a head.

    Padding is not seen, wherever it stands in a row. Rotary positions count a document's own tokens.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stack = config.stack
        moe = config.routing
        self.embedding = nn.Embedding(stack.vocab_size, stack.d_model)
        check_pattern(stack, moe)
        self.looks_ahead, self.has_experts = looks_ahead(stack, moe), has_experts(stack, moe)
        self.layers = nn.ModuleList(MoEMambaLayer(spec, stack, moe) for spec in layer_specs(stack, moe))
        routers = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        self.balanced = {name for name, router in routers.items() if router.config.balance == "loss"}
        self.final_norm = build_norm(stack) if stack.final_norm else None
        self.gradient_checkpointing = False
        if operations is Plain:
            logger.warning_once(
                "MoEMamba runs without its kernels, as the package moe_mamba is not installed: prompts and training "
                "take about twice as long on a CPU, and many times as long on a GPU. Install moe_mamba to have them."
            )
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the embedding starts."""
        return {"embedding.weight": embedding_weight(self.config.stack)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        vars(value)["_is_hf_initialized"] = True
        self.embedding = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
        **documents: Any,
    ) -> MoEMambaModelOutput | tuple:
        """Read tokens.

        Args:
            input_ids: (batch, length) int64; or else ``inputs_embeds``.
            attention_mask: (batch, tokens of the cache + length), 0 on padding. Experts see padding as they see tokens:
                it counts in the routers' losses, and in capacities.
            position_ids: (batch or 1, length), rising by one; where they begin again at 0 a document starts, which
                sees nothing before it.
            cache: from an earlier pass, or a new one. ``past_key_values`` is its older name.
            inputs_embeds: (batch, length, d_model).
            use_cache: return a cache; by default in evaluation, if ``config.use_cache`` says so.
            output_attentions: return the weights of each attention layer, (batch, heads, length, past + length).
            output_hidden_states: return the stream before each layer, and after the final norm.
            output_router_logits: return (batch x length, experts) for each router, in fp32, in the order that they
                route.
            return_dict: False: a tuple.
            past_key_values: see ``cache``.
            documents: what packing collators give: ``seq_idx`` (batch, length), the number of each token's document;
                ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (documents + 1,), where those of the one row start and the
                last ends; ``max_length_q`` and ``max_length_k``, which follow from them.

        Raises:
            TypeError: a keyword that is none of these.
            ValueError: both inputs or none, tokens outside the vocabulary (on a CPU), both names of a cache, a mask or
                positions that do not fit, a cache with expert choice, of another class, of another batch or without
                room, tokens that go on from others whose cache is missing.
        """
        if unknown := documents.keys() - DOCUMENTS:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}{_nearest(min(unknown))}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        _check_shape(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
        cache = self._cache(cache, past_key_values, use_cache)
        config, length = self.config, inputs_embeds.shape[1]
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_streams = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        recording = Recording(
            streams=[] if wants_streams else None,
            attentions=[] if wants_attentions or config._attn_implementation == "eager" else None,
            router_logits=[] if wants_routers else None,
        )
        document_starts = packed_document_starts(inputs_embeds, **documents)
        reading = read(inputs_embeds.shape[0], length, cache, attention_mask, position_ids, document_starts)
        if self.looks_ahead and (reading.document_starts is not None or reading.visible is not None):
            raise ValueError(
                "moe.router=expert_choice: experts choose among all tokens of a row, so padding and packed documents "
                "would change each other's results: give texts of one length, one in each row"
            )
        stream, statistics = self._mix(inputs_embeds, cache, reading, recording)  # (batch, length, d_model)
        if self.final_norm is not None:
            stream, _ = self.final_norm(stream)
        recorded: dict[str, Any] = {CACHE: cache}
        if wants_streams:
            recorded["hidden_states"] = (*(reordered(one, reading.places) for one in recording.streams or []), stream)
        if wants_attentions:
            weights = recording.attentions or []
            recorded["attentions"] = tuple(reordered_attention(weight, reading.places) for weight in weights)
        if wants_routers:
            logits = recording.router_logits or []
            recorded["router_logits"] = tuple(reordered_rows(one, reading.places) for one in logits)
            recorded["router_statistics"] = statistics
        output = MoEMambaModelOutput(last_hidden_state=stream, **recorded)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _embedded(self, input_ids: Any) -> Tensor:
        """Embeddings of tokens. A CPU notices one outside the vocabulary; on a GPU the kernel's own assertion fails."""
        try:
            return self.embedding(input_ids)
        except IndexError as error:
            size = self.config.vocab_size
            outside = input_ids[(input_ids < 0) | (input_ids >= size)]
            if not len(outside):
                raise
            raise ValueError(f"input_ids has {int(outside[0])}, and must have tokens from 0 to {size - 1}") from error

    def _cache(self, given: StateCache | None, older: StateCache | None, use_cache: bool | None) -> StateCache | None:
        """The cache that this pass fills, or None."""
        if given is not None and older is not None:
            raise ValueError("cache and past_key_values are two names for the same thing: pass only one")
        given = older if given is None else given
        if given is not None or use_cache:
            self.check_that_it_generates()
        if given is not None and not isinstance(given, StateCache):
            raise ValueError(f"the cache is a {type(given).__name__}: pass a MoEMambaCache, or None for a new one")
        if given is not None and use_cache is False:
            raise ValueError("a cache was passed with use_cache=False: leave out one of them")
        if self._computes_again() and (given is not None or use_cache):
            if given is not None and not given.is_empty:
                raise ValueError(
                    "gradient checkpointing cannot continue from a cache: disable it, or pass the whole text"
                )
            logger.warning_once("MoEMamba: gradient checkpointing keeps no cache in training: use_cache=False")
            return None
        if given is not None:
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self.looks_ahead
        return MoEMambaCache() if use_cache else None

    def _computes_again(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def check_that_it_generates(self) -> None:
        """Refuse what has no cache.

        Raises:
            ValueError: the experts choose their tokens.
        """
        if self.looks_ahead:
            raise ValueError(
                "moe.router=expert_choice looks ahead at later tokens, so it has no cache and cannot generate: "
                "pass use_cache=False to forward, or train with moe.router=switch or top_k"
            )

    def _mix(
        self, embedded: Tensor, cache: StateCache | None, reading: Reading, recording: Recording
    ) -> tuple[Tensor, Statistics]:
        """Run the layers over ``embedded`` (batch, length, d_model) from the cache's states; fills the cache."""
        batch, length, _ = embedded.shape
        states = None if cache is None else self._states(cache, embedded)
        document_starts = reading.document_starts
        is_step = length == 1 and cache is not None and not cache.is_empty
        if document_starts is None and is_step and torch.is_grad_enabled():
            # The step for one token has no gradient; a pass has.
            document_starts = torch.zeros(batch, 1, dtype=torch.bool, device=embedded.device)
        stream = reordered(embedded, reading.order)
        run = partial(run_layers, self.layers, merge=self._computes_again())
        if reading.waiting is not None and states is not None:
            if recording != Recording():
                raise ValueError("there is padding after cached text: no layer's results can be recorded")
            stream, statistics, states = run_with_waiting(run, stream, document_starts, states, reading.waiting)
        else:
            sequences = Sequences(batch, length, document_starts, recording)
            stream, statistics, states = run(stream.flatten(0, 1), sequences, states)
        if cache is not None and states is not None:
            cache.keep(states)
            cache.count(batch, length, reading.visible)
        return reordered(stream.view(embedded.shape), reading.places), statistics

    def _states(self, cache: StateCache, embedded: Tensor) -> list[State | None]:
        """The cache's states, or those before any token. All are zeros: quantised or offloaded weights make none."""
        batch, length, _ = embedded.shape
        if cache.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache has states of {cache.batch_size} sequences, and the batch has {batch}: "
                "see its batch_repeat_interleave"
            )
        room = cache.max_cache_len
        if torch.compiler.is_compiling() and cache.states:
            if room is not None:
                full = f"the cache has room for {room} tokens, and there are more: make it larger"
                torch._assert_async(torch.as_tensor(cache.seen) + length <= room, full)
            return cache.states
        if room is not None and not torch.compiler.is_compiling() and int(cache.seen) + length > room:
            raise ValueError(
                f"the cache has room for {room} tokens, holds {int(cache.seen)} and gets {length} more: make it larger"
            )
        return cache.states or initial_states(self.layers, batch, embedded.dtype, embedded.device, room)
