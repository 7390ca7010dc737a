"""How Transformers fills, loads, shrinks and spreads the models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.shell.configuration import MoEMambaConfig
from moe_mamba.hf.shell.experts import EXPERTS_IMPLEMENTATIONS, MoEMambaExperts
from moe_mamba.model.initialize import Initializer
from moe_mamba.model.layer import Layer, fp32_parameter_names
from moe_mamba.model.mixers.moe import Experts, MoE
from moe_mamba.model.pattern import LayerSpec, has


class MoEMambaLayer(GradientCheckpointingLayer, Layer):
    """A layer whose activations Transformers can let go and have computed again, and whose experts it may compute."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(spec, config, moe)
        for mixer in self.mixers:
            for name, experts in mixer.named_children():
                if isinstance(experts, Experts):
                    setattr(mixer, name, MoEMambaExperts(experts))


class MoEMambaPreTrainedModel(PreTrainedModel):
    """How Transformers fills, loads, shrinks and spreads the models."""

    config_class = MoEMambaConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["MoEMambaLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def post_init(self) -> None:
        """Fill the weights, and name what stays fp32 in a model of 16 bits."""
        super().post_init()
        names = fp32_parameter_names(self)
        self._keep_in_fp32_modules_strict = names
        for name in names:
            tensor = self.get_parameter_or_buffer(name)
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """The parameter or buffer of this name."""
        owner, _, name = target.rpartition(".")
        return getattr(self.get_submodule(owner), name)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill what no checkpoint has filled, from torch's random numbers, as the trainer's models start."""
        for model in self.modules():
            if isinstance(model, MoEMambaPreTrainedModel):
                vars(model)["_fills"] = _fills(model)
        try:
            super().initialize_weights()
        finally:
            for model in self.modules():
                vars(model).pop("_fills", None)  # functions of functions cannot be pickled

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a module itself owns; what a vocabulary gains is filled by who enlarges it."""
        for name, fill in getattr(self, "_fills", {}).get(module, {}).items():
            tensor = getattr(module, name)
            if not getattr(tensor, "_is_hf_initialized", False):
                fill(tensor, None)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Eager and sdpa, which attention asks for at each pass."""
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """What experts ask for at each pass."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The way that experts are computed: the class's own, unless another is asked for.

        Raises:
            ValueError: a way that the class does not know, or a model without layers ``E``: experts inside Mamba are
                computed in the class's own way.
        """
        wanted = "eager" if requested_experts is None else requested_experts
        if wanted not in EXPERTS_IMPLEMENTATIONS:
            raise ValueError(f"experts_implementation={wanted}: MoEMamba has {', '.join(EXPERTS_IMPLEMENTATIONS)}")
        if wanted != "eager" and not has(self.config.stack, MoE):
            raise ValueError(
                f"experts_implementation={wanted}: a model of pattern {self.config.pattern} has no experts of "
                "layers E: leave it out"
            )
        return wanted

    def _set_gradient_checkpointing(  # type: ignore[override]  # older ones know fewer arguments
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Let layers compute again; without reentrance, which would lose the gradient of the routers' losses."""
        if getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("gradient checkpointing recomputes layers and does not offload: leave out offload")
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is random
        super()._set_gradient_checkpointing(enable, again, **kwargs)


def _fills(model: nn.Module) -> dict[nn.Module, dict[str, Initializer]]:
    """Module -> name of a tensor of its own -> what fills it; some modules tell of their children's."""
    found: dict[nn.Module, dict[str, Initializer]] = {}
    for module in model.modules():
        for name, fill in getattr(module, "initializers", dict)().items():
            owner, _, own = name.rpartition(".")
            found.setdefault(module.get_submodule(owner), {})[own] = fill
    return found
