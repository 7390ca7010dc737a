"""The language model with its head and loss, and what Transformers' ``generate`` asks of it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moe_mamba.hf.shell.backbone import MoEMambaModel
from moe_mamba.hf.shell.cache import CACHE, MoEMambaCache, MoEMambaStaticCache, StateCache
from moe_mamba.hf.shell.configuration import SHARDS_TENSORS
from moe_mamba.hf.shell.pretrained import MoEMambaPreTrainedModel
from moe_mamba.model.initialize import Initializer, head_weight
from moe_mamba.model.loss import cross_entropy_sum
from moe_mamba.model.mixers.base import Statistics
from moe_mamba.model.mixers.routing import balance_loss, z_loss

OLDER_NAMES = {r"^model\.head\.": "lm_head."}
"""Tensors of folders that were exported before the head had its own place -> their names here."""


class MoEMambaForCausalLM(MoEMambaPreTrainedModel, GenerationMixin):
    """The model with a head that predicts the token after each one, for generation and training.

    Padding is not seen, wherever it stands in a row. Rotary positions count a document's own tokens.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"} if SHARDS_TENSORS else None
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MoEMambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the head starts; a tied one is the embedding's weight."""
        stack = self.config.stack
        return {} if stack.tied_head else {"lm_head.weight": head_weight(stack)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head; with ``config.tied_head`` its weight is the embedding's."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        vars(new_embeddings)["_is_hf_initialized"] = True
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: StateCache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Predict the token after each one.

        Args:
            input_ids: see ``MoEMambaModel.forward``, as for all that is not named here.
            attention_mask: mask the labels of padding as well.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: (batch, length), the tokens themselves (they are shifted in here); -100 is not counted.
            use_cache: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            output_router_logits: return them, and add the routers' losses, with the weights that the trainer gives
                them, to the loss.
            return_dict: False: a tuple.
            logits_to_keep: logits of only so many last tokens, or of these places; 0: of all. Not with labels.
            num_items_in_batch: divides the loss, in the place of the number of labels that count, as in the Trainer.
            past_key_values: see there.
            kwargs: ``shift_labels`` (batch, length), the token after each one, in the place of ``labels``: where a
                text is spread over devices, the first token of the next part is its last label. (Not an argument of
                its own: Transformers' Trainer would ask every batch for it.) The rest: see there.

        Returns:
            ``aux_loss`` is what was added for the routers.

        Raises:
            TypeError: as ``MoEMambaModel.forward``.
            ValueError: as there.
        """
        targets = kwargs.pop("shift_labels", None)
        wants_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=wants_routers,
            return_dict=True,
            past_key_values=past_key_values,
            **kwargs,
        )
        stream = read.last_hidden_state
        self._check_labels(labels, "labels", stream)
        self._check_labels(targets, "shift_labels", stream)
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is None:
            stream = stream[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else stream[:, logits_to_keep]
        logits = self.lm_head(stream)  # (batch, length, vocab)
        loss, auxiliary = self._loss(logits, targets, num_items_in_batch, read.router_statistics or {})
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            router_logits=read.router_logits,
            **{CACHE: getattr(read, CACHE)},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_labels(self, labels: Tensor | None, name: str, stream: Tensor) -> None:
        """Refuse labels of another shape than the tokens', or outside the vocabulary; -100 is not counted."""
        if labels is None:
            return
        if labels.shape != stream.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}, and must be {tuple(stream.shape[:2])}")
        size = self.config.vocab_size
        inside = ((labels >= 0) & (labels < size)) | (labels == -100)
        torch._assert_async(inside.all(), f"{name} must be -100, or tokens from 0 to {size - 1}")

    def _loss(
        self,
        logits: Tensor,
        targets: Tensor | None,
        items: int | Tensor | None,
        statistics: Statistics,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, and the part of it that is the routers'; None for what was not asked for.

        As in training, the balance loss is the mean over the routers that have one, the z-loss over all.
        """
        moe, auxiliary, loss = self.config.moe, None, None
        share: float | Tensor = 1.0
        if targets is not None:
            loss, count = cross_entropy_sum(logits, targets.to(logits.device))
            items = count if items is None else torch.as_tensor(items, device=loss.device)
            # Micro-steps are added up: each has its share of the batch in the routers' losses, too.
            loss, share = loss / items, count / items
        if statistics:
            z = torch.stack([z_loss(router).to(logits.device) for router in statistics.values()]).mean()
            auxiliary = share * moe["z_loss_weight"] * z
            balanced = [router for name, router in statistics.items() if name in self.model.balanced]
            if balanced:
                balance = torch.stack([balance_loss(router).to(logits.device) for router in balanced]).mean()
                auxiliary = auxiliary + share * moe["balance_weight"] * balance
            if loss is not None:
                loss = loss + auxiliary
        return loss, auxiliary

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """As in any model of Transformers; the head of older folders is found under its older name."""
        return super().from_pretrained(*args, key_mapping=OLDER_NAMES | (key_mapping or {}), **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``generate`` gives to a pass."""
        new = kwargs.get("next_sequence_length")  # of the text, what the cache has not read
        if new is not None and new <= 0:
            length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
            raise ValueError(
                f"the text has {length} tokens, and the cache has read {length - new}: pass the whole text, what the "
                "cache has read and at least one token more"
            )
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("cache_position", None)  # the cache counts for itself
        inputs.pop("token_type_ids", None)
        return inputs

    def _prepare_attention_mask_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that Transformers guesses from pad tokens, but those that stand inside a text: they are text."""
        mask = super()._prepare_attention_mask_for_generation(*args, **kwargs)
        after_first, before_last = mask.cumsum(-1) > 0, mask.flip(-1).cumsum(-1).flip(-1) > 0
        return (after_first & before_last).to(mask.dtype)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in any model of Transformers; a cache may have either name, whatever the library's version calls it.

        Raises:
            ValueError: both names are given.
        """
        given = [kwargs.pop(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
        if len(given) > 1:
            raise ValueError("cache and past_key_values are two names for the same thing: pass only one")
        if given:
            kwargs[CACHE] = given[0]
        return super().generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """No mask of four dimensions for a cache with room: layers make what they need of the one they get."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if attention_mask is None or cache is None or cache.max_cache_len is None:
            return attention_mask
        # As wide as the room, so that every step has the same shapes.
        return nn.functional.pad(attention_mask, (0, max(0, cache.max_cache_len - attention_mask.shape[1])))

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give ``generate`` the one kind of cache that fits."""
        self.model.check_that_it_generates()
        if batch_size > 1 and self.config.moe["evaluation_capacity"] is not None and self.model.has_experts:
            capacity = self.config.moe["evaluation_capacity"]
            raise ValueError(
                f"moe.evaluation_capacity={capacity:g} lets the texts of a batch displace each other's tokens: "
                "generate one at a time"
            )
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation={wanted}: a MoEMambaCache is only dynamic or static")
        if given is not None:
            if wanted is not None:
                raise ValueError(f"cache_implementation={wanted} was passed with a cache: pass only one")
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = MoEMambaCache()
            if wanted == "static":
                # As large as any before, so that a compiled step fits again.
                asked = getattr(generation_config, "max_cache_len", None) or 0
                self._room = max(max_cache_length, asked, getattr(self, "_room", 0))
                model_kwargs[CACHE] = MoEMambaStaticCache(self._room)


MoEMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained writes this file, too
