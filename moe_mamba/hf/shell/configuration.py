"""Configuration of a model that moe_mamba trained, as Transformers keeps it."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
@dataclass(kw_only=True)
class MoEConfig:
    """Routing and experts of the layers written ``E``: what ``MoEMambaConfig.moe`` holds, as a dictionary.

    Args:
        assembled: arguments of MoEConfig
    """

    # assembled: fields of MoEConfig

    # assembled: methods of MoEConfig


@strict
class MoEMambaConfig(PreTrainedConfig):
    """The residual stack, a letter a layer, and its sizes.

    Args:
        assembled: arguments of ModelConfig
        moe: routing and experts, keys and defaults as in ``MoEConfig``.
        use_cache: whether a pass in evaluation returns a cache by default.
        output_router_logits: whether a pass returns them, and the loss has the routers' losses, by default.
        bos_token_id: token that begins a text, if any does.
        eos_token_id: token that ends a text, if any does.
        pad_token_id: token that fills batches.
    """

    model_type = "moe_mamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tied_head",
    }
    kernels: ClassVar[str] = "auto"

    # assembled: fields of ModelConfig
    moe: dict[str, Any] | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.moe = asdict(MoEConfig(**(self.moe or {})))
        self._check()
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Letters of the whole pattern."""
        return len(self.layers)

    # assembled: methods of ModelConfig


MoEMambaConfig.register_for_auto_class()  # save_pretrained writes this file, too
