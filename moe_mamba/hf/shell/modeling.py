"""What Transformers asks of a language model that generates, around the trainer's own ``LanguageModel``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from moe_mamba.hf.shell.cache import MoEMambaCache, map_state
from moe_mamba.hf.shell.configuration import MoEConfig, MoEMambaConfig
from moe_mamba.hf.shell.kernels import Plain, operations
from moe_mamba.model.language_model import LanguageModel, State
from moe_mamba.model.loss import cross_entropy_sum
from moe_mamba.model.mamba import Mamba
from moe_mamba.model.routing import Router, RouterStatistics, balance_loss, z_loss
from moe_mamba.model.sequences import Sequences

logger = logging.get_logger(__name__)


class MoEMambaPreTrainedModel(PreTrainedModel):
    """How Transformers fills, loads and spreads the model."""

    config_class = MoEMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill what no checkpoint has filled, from torch's random numbers, as the trainer's models start."""
        for module in self.modules():
            initializers: Any = getattr(module, "initializers", dict)
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, fill in initializers().items():
                if not getattr(tensors[name], "_is_hf_initialized", False):
                    fill(tensors[name], None)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Turn ``LanguageModel.recompute`` on or off; it chooses the arguments of ``checkpoint`` itself."""
        if every_n_layers != 1 or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("gradient checkpointing recomputes every layer, without offload: leave out both options")
        self.gradient_checkpointing = self.model.recompute = enable


class MoEMambaForCausalLM(MoEMambaPreTrainedModel, GenerationMixin):
    """A language model of Mamba, attention, feed-forward layers and experts, as ``config.pattern`` names them.

    Padding on the left is not seen: each row starts at its first token that the mask shows, and rotary positions count
    from there. Padding on the right is never seen, since nothing looks ahead; mask its labels.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        moe: Any = MoEConfig(**config.moe)
        self.model = LanguageModel(config, moe)
        if self.model.head is None:  # the embedding's weight, as Transformers ties it
            self.model.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in self.model.fp32_parameter_names()}
        for name in self._keep_in_fp32_modules_strict:
            tensor = self.get_parameter_or_buffer(name)
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        for layer in self.model.layers:
            if isinstance(layer.mixer, Mamba):
                layer.mixer.register_forward_pre_hook(_bring_weights)
                layer.mixer.register_forward_hook(_return_weights)
        if operations is Plain:
            logger.warning_once(
                "MoEMamba runs without its kernels, as the package moe_mamba is not installed: prompts and training "
                "take about twice as long on a CPU, and many times as long on a GPU. Install moe_mamba to have them."
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; with ``config.tied_head`` its weight is the embedding's."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoEMambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Predict the token after each one.

        Args:
            input_ids: (batch, length) int64; or else ``inputs_embeds``.
            attention_mask: (batch, tokens of the cache + length), 0 on padding, which must be left or right of the
                text. Experts see padding as they see tokens: it counts in the router's losses, and in capacities.
            position_ids: not looked at, positions follow from the mask.
            past_key_values: from an earlier pass, or a new one.
            inputs_embeds: (batch, length, d_model).
            labels: (batch, length), the tokens themselves (they are shifted in here); -100 is not counted.
            use_cache: return a cache; by default in evaluation, if ``config.use_cache`` says so.
            output_router_logits: return them, and add the router's losses, with the weights that the trainer gives
                them, to the loss.
            output_hidden_states: return the stream before each layer, and after the last.
            return_dict: False: a tuple.
            logits_to_keep: logits of so many last tokens alone, or of these places; 0: of all. Not with ``labels``.
            num_items_in_batch: divides the loss, in the place of the number of labels that count, as in the Trainer.
            kwargs: not looked at.

        Returns:
            ``aux_loss`` is what was added for the routers, ``router_logits`` (batch x length, experts) for each layer
            of experts, in fp32.

        Raises:
            ValueError: both inputs or none, a mask of another shape, a cache with expert choice, of another class or of
                another batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.model.embedding(input_ids)
        cache = self._cache(past_key_values, use_cache)
        config = self.config
        wants_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        wants_stream = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        router_logits: list[Tensor] = []
        hidden_states: list[Tensor] = []
        with (
            _without_autocast(inputs_embeds.device.type),
            _recorded_logits(self.model.routers(), router_logits) if wants_routers else nullcontext(),
            _recorded_stream(self.model.layers, hidden_states, inputs_embeds.shape) if wants_stream else nullcontext(),
        ):
            stream, statistics = self._mix(inputs_embeds, attention_mask, cache)  # (batch, length, d_model)
            if wants_stream:
                hidden_states.append(stream)
            if labels is None:
                stream = stream[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else stream[:, logits_to_keep]
            logits = self._logits(stream)  # (batch, length, vocab)
            loss, auxiliary = self._loss(logits, labels, num_items_in_batch, statistics if wants_routers else [])
        recorded: Any = (
            tuple(router_logits) if wants_routers else None,
            tuple(hidden_states) if wants_stream else None,
        )
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits,
            past_key_values=cache,
            router_logits=recorded[0],
            hidden_states=recorded[1],
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _cache(self, given: MoEMambaCache | None, use_cache: bool | None) -> MoEMambaCache | None:
        """The cache that this pass fills, or None."""
        if given is not None or use_cache:
            self._check_that_it_generates()
        if given is not None and not isinstance(given, MoEMambaCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}: pass a MoEMambaCache, or None for a new one"
            )
        if self.training and self.gradient_checkpointing and (given is not None or use_cache):
            raise ValueError("gradient checkpointing keeps no cache in training: pass use_cache=False")
        if given is not None:
            if use_cache is False:
                raise ValueError("past_key_values with use_cache=False: leave out one of them")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self._looks_ahead()
        return MoEMambaCache() if use_cache else None

    def _looks_ahead(self) -> bool:
        return "E" in self.config.layers and self.config.moe["router"] == "expert_choice"

    def _check_that_it_generates(self) -> None:
        if self._looks_ahead():
            raise ValueError(
                "moe.router=expert_choice looks ahead at later tokens, so it has no cache and cannot generate: "
                "pass use_cache=False to forward, or train with moe.router=switch or top_k"
            )

    def _mix(
        self, embedded: Tensor, mask: Tensor | None, cache: MoEMambaCache | None
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """Run the layers over ``embedded`` (batch, length, d_model) from the cache's states; fills the cache."""
        batch, length, _ = embedded.shape
        past = 0 if cache is None else cache.length
        if cache is not None and cache.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values has states of {cache.batch_size} sequences, and the batch has {batch}: "
                "see its batch_repeat_interleave"
            )
        starts = None if mask is None else _starts(mask, batch, past, length)
        if starts is None and length == 1 and past and torch.is_grad_enabled():
            # The step for one token has no gradient; a pass has.
            starts = torch.zeros(batch, 1, dtype=torch.bool, device=embedded.device)
        states = None
        if cache is not None:
            states = cache.states or self._empty_states(batch, embedded.device)
        stream, statistics, states = self.model.mix(embedded.flatten(0, 1), Sequences(batch, length, starts), states)
        if cache is not None and states is not None:
            cache.states, cache.length = states, past + length
        return stream.view(embedded.shape), statistics

    def _empty_states(self, batch: int, device: torch.device) -> list[State]:
        """States before any token. All are zeros, which weights that lie on a disk could not make."""
        states = self.model.initial_states(batch)
        return [state and map_state(state, partial(torch.zeros_like, device=device)) for state in states]

    def _logits(self, stream: Tensor) -> Tensor:
        if self.model.final_norm is not None:
            stream, _ = self.model.final_norm(stream)
        return self.model.head(stream)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        items: int | Tensor | None,
        statistics: list[RouterStatistics],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, and the part of it that is the routers'; None for what was not asked for."""
        moe, auxiliary, loss = self.model.moe_config, None, None
        share: float | Tensor = 1.0
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
            loss, count = cross_entropy_sum(logits, targets, backend=self.config.kernels)
            items = count if items is None else torch.as_tensor(items, device=loss.device)
            # Micro-steps are added up: each has its share of the batch in the routers' losses, too.
            loss, share = loss / items, count / items
        if statistics:
            balance, z = (
                torch.stack([function(layer).to(logits.device) for layer in statistics]).mean()
                for function in (balance_loss, z_loss)
            )
            auxiliary = share * moe.z_loss_weight * z
            if moe.balance == "loss":
                auxiliary = auxiliary + share * moe.balance_weight * balance
            if loss is not None:
                loss = loss + auxiliary
        return loss, auxiliary

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        """Give ``generate`` the one cache that there is."""
        self._check_that_it_generates()
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={wanted}: a MoEMambaCache is the only one that fits, leave it out")
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoEMambaCache()


def _starts(mask: Tensor, batch: int, past: int, length: int) -> Tensor | None:
    """Where a row's text starts among the new tokens, (batch, length) bool; None: nowhere after the first place.

    Raises:
        ValueError: a mask of another shape, or with padding between tokens.
    """
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < past + length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and must be ({batch}, {past + length}): "
            f"a row for each sequence, the {past} tokens of the cache before the {length} new ones"
        )
    mask = mask[:, : past + length].bool()
    begins = mask & ~nn.functional.pad(mask, (1, -1))
    starts = begins[:, past:].clone()
    if past == 0:
        starts[:, 0] = False  # nothing is before it
    if not starts.any():
        return None
    if (begins.sum(1) > 1).any():
        raise ValueError(
            "attention_mask has padding between tokens, which a state cannot skip: pad on the left, or on the right "
            "alone; without a mask, generate takes every pad_token_id in the text for padding"
        )
    return starts


def _bring_weights(mixer: Mamba, args: Any) -> None:
    """Load what a device map left on a CPU or disk: accelerate does so where a module is called, and these are not."""
    for child, hook in _hooked(mixer):
        hook.pre_forward(child)


def _return_weights(mixer: Mamba, args: Any, output: Any) -> None:
    for child, hook in _hooked(mixer):
        hook.post_forward(child, None)


def _hooked(mixer: Mamba) -> list[tuple[nn.Module, Any]]:
    children = (mixer.conv1d, mixer.dt_proj)
    return [(child, child._hf_hook) for child in children if hasattr(child, "_hf_hook")]


@contextmanager
def _recorded_logits(routers: Sequence[Router], logits: list[Tensor]) -> Iterator[None]:
    """Keep what the routers' linear maps give."""

    def record(router: Router, x: Tensor) -> Tensor:
        logits.append(Router.logits(router, x))
        return logits[-1]

    for router in routers:
        router.logits = partial(record, router)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers:
            del router.logits


@contextmanager
def _recorded_stream(layers: nn.ModuleList, kept: list[Tensor], shape: torch.Size) -> Iterator[None]:
    """Keep the stream before each layer, its predecessor's update added."""

    def record(layer: nn.Module, args: tuple) -> None:
        stream, update = args[:2]
        kept.append((stream if update is None else stream + update).view(shape))

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_autocast(device: str) -> Any:
    """Leave autocast: every operation here names the dtype that it computes in."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    logger.warning_once(
        "MoEMamba leaves autocast and computes in the dtype of its weights: load it with dtype=torch.bfloat16 for bf16."
    )
    return torch.autocast(device, enabled=False)


MoEMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained writes this file, too
