"""The model with a score for each class of a text: classifiers, and reward models."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from moe_mamba.hf.shell.backbone import MoEMambaModel
from moe_mamba.hf.shell.cache import CACHE, StateCache
from moe_mamba.hf.shell.pretrained import MoEMambaPreTrainedModel
from moe_mamba.model.initialize import Initializer, normal


class MoEMambaForSequenceClassification(MoEMambaPreTrainedModel):
    """The model with a linear map from a text's last token to ``config.num_labels`` scores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MoEMambaModel(config)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the scores start."""
        return {"score.weight": normal(0.02)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.set_input_embeddings(value)

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
        past_key_values: StateCache | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Score each text by its last token.

        Args:
            input_ids: see ``MoEMambaModel.forward``, as for all that is not named here.
            attention_mask: says which token is a text's last one; without it, the last that is no
                ``config.pad_token_id``.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: (batch,) classes or values, or (batch, labels) of several: see ``config.problem_type``.
            use_cache: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            output_router_logits: see there; they are not returned here, as the output has no place for them.
            return_dict: False: a tuple.
            past_key_values: see there.

        Returns:
            ``logits`` (batch, labels).

        Raises:
            ValueError: as ``MoEMambaModel.forward``, and several texts without a mask or a pad token.
        """
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            past_key_values=past_key_values,
        )
        stream = read.last_hidden_state  # (batch, length, d_model)
        last = self._last_tokens(stream, input_ids, attention_mask)
        logits = self.score(stream)[torch.arange(len(stream), device=stream.device), last]
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels.to(logits.device))
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            **{CACHE: getattr(read, CACHE)},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _last_tokens(self, stream: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """The place of each text's last token, (batch,)."""
        batch, length, _ = stream.shape
        pad = self.config.pad_token_id
        if mask is not None:
            visible = mask[:, -length:].bool()
        elif input_ids is not None and pad is not None:
            visible = input_ids != pad
        elif batch == 1:
            return torch.full((1,), length - 1, device=stream.device)
        else:
            raise ValueError(
                "several texts need an attention_mask, or a config.pad_token_id, to know their last tokens"
            )
        place = torch.arange(length, device=stream.device)
        return (place * visible.to(stream.device)).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean square, cross entropy, or binary cross entropy, as ``config.problem_type`` or the labels say."""
        kind = self.config.problem_type
        if kind is None:
            is_class = labels.dtype in (torch.int64, torch.int32)
            if self.num_labels == 1:
                kind = "regression"
            else:
                kind = "single_label_classification" if is_class else "multi_label_classification"
            self.config.problem_type = kind
        if kind == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if kind == "single_label_classification":
            return nn.functional.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


MoEMambaModel.register_for_auto_class("AutoModel")  # save_pretrained writes this file, too
MoEMambaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
