"""MistralForCausalLM: as Llama, with a sliding window of attention and without biases."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import Entry, build
from moe_mamba.hf.formats.llama import dense_entries, read_transformer, transformer_configuration, transformer_refusal
from moe_mamba.hf.formats.settings import INERT, TRAINING_ALONE, Configuration, Settings


class Mistral:
    """Pattern ``*-``."""

    name = "mistral"
    architecture = "MistralForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        return transformer_refusal(model, moe, self.architecture, "*-", ("sliding_window",))

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "mistral",
            "architectures": [self.architecture],
            **transformer_configuration(model),
            "intermediate_size": model.resolved_d_ff,
            "sliding_window": model.sliding_window,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        with Settings(configuration, self.architecture, INERT | TRAINING_ALONE) as settings:
            keys = read_transformer(settings, rms_norm_eps=1e-6, kv_heads=8)
            window = settings.optional_number("sliding_window", 4096)
            return build(keys | {"pattern": "*-", "sliding_window": window}, {})

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        return dense_entries(model)
