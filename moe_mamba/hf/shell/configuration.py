"""Configuration of a model that moe_mamba trained, as Transformers keeps it."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Optional, Union

import transformers
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from moe_mamba.hf.versions import NEWEST, OLDEST

installed = tuple(map(int, transformers.__version__.split(".")[:2]))
SHARDS_TENSORS = installed >= (5, 23)  # as ``base_model_tp_plan`` says: older ones shard otherwise

if installed < tuple(map(int, OLDEST.split(".")[:2])):
    raise ImportError(f"MoEMamba needs transformers {OLDEST} to {NEWEST}, and {transformers.__version__} is installed")


logger = logging.get_logger(__name__)

KEPT = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
    "trust_remote_code",
}
"""Keys that Transformers keeps in some configurations and versions, and that are none of the model's."""


@strict
@dataclass(kw_only=True)
class InnerConfig:
    """Mixtures inside Mamba mixers: what ``MoEMambaConfig.moe`` holds under ``inner``.

    Args:
        assembled: arguments of InnerConfig
    """

    # assembled: fields of InnerConfig

    # assembled: methods of InnerConfig


@strict
@dataclass(kw_only=True)
class MoEConfig:
    """Routing and experts of the layers written ``E``: what ``MoEMambaConfig.moe`` holds, as a dictionary.

    Args:
        assembled: arguments of MoEConfig
    """

    # assembled: fields of MoEConfig

    @classmethod
    def of(cls, moe: dict[str, Any]) -> "MoEConfig":
        """What a dictionary says, with one under ``inner``."""
        return cls(**moe | {"inner": InnerConfig(**moe.get("inner", {}))})  # type: ignore[call-arg]  # assembled

    # assembled: methods of MoEConfig


@strict
@dataclass(kw_only=True)
class StackConfig:
    """The residual stack, a letter per layer, and its sizes: what ``MoEMambaConfig`` holds of it, and derives.

    Args:
        assembled: arguments of ModelConfig
    """

    # assembled: fields of ModelConfig

    # assembled: methods of ModelConfig

    @property
    def _attn_implementation(self) -> str | None:
        """What the whole configuration says: Transformers' users look for it at each module's ``config``."""
        return getattr(vars(self).get("whole"), "_attn_implementation", None)

    @property
    def _experts_implementation(self) -> str | None:
        """As ``_attn_implementation``; Transformers 4 has none."""
        return getattr(vars(self).get("whole"), "_experts_implementation", None)


class MoEMambaConfig(PretrainedConfig):
    """The residual stack, a letter per layer, and its sizes.

    Args:
        moe: routing and experts, keys and defaults as in ``MoEConfig``; under ``inner`` those of ``InnerConfig``.
        use_cache: whether a pass in evaluation returns a cache by default.
        output_router_logits: whether a pass returns them, and the loss has the routers' losses, by default.
        bos_token_id: token that begins a text, if any does.
        eos_token_id: token that ends a text, if any does.
        pad_token_id: token that fills batches.
        kwargs: keys of the stack, with types and defaults as in ``StackConfig``, and what Transformers keeps in any
            configuration.

    Raises:
        ValueError: values that make no model.
    """

    model_type = "moe_mamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tied_head",
    }

    def __init__(
        self,
        moe: dict[str, Any] | None = None,
        use_cache: bool = True,
        output_router_logits: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        stack = StackConfig(**{key.name: kwargs.pop(key.name) for key in fields(StackConfig) if key.name in kwargs})
        for key in fields(StackConfig):
            setattr(self, key.name, getattr(stack, key.name))
        self.moe = asdict(MoEConfig.of(moe or {}))
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        own = PretrainedConfig()
        if unknown := [name for name in kwargs if not (name.startswith("_") or name in KEPT or hasattr(own, name))]:
            logger.warning(f"MoEMambaConfig knows no {', '.join(unknown)}: nothing reads what is said there")
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs, tie_word_embeddings=self.tied_head)  # type: ignore[call-arg]  # 4.57 has a default

    @property
    def stack(self) -> StackConfig:
        """The keys of the stack as they are now, checked, and what follows from them."""
        stack = StackConfig(**{key.name: getattr(self, key.name) for key in fields(StackConfig)})
        vars(stack)["whole"] = self
        return stack

    @property
    def routing(self) -> Any:
        """The keys of ``moe`` as they are now, checked, and what follows from them."""
        return MoEConfig.of(self.moe)

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]  # others' are the same for all
        """What tensor parallelism shards -> how, in Transformers' words; None for versions before 5.23.

        Mamba layers are replicated, their experts among them. So is a feed-forward layer beside them, since a plan
        cannot tell its projections from theirs, and one with biases of gates: Transformers gives a rank the biases of
        other columns.
        """
        if not SHARDS_TENSORS:
            return None
        gated = self.activation == "swiglu"
        columns, last_axis = ("packed_colwise", "packed_rowwise") if gated else ("colwise", "rowwise")
        plan = {"embedding": "embedding_rowwise"}
        alone = "".join(letters for letters in self.layers if len(letters) == 1)
        beside = "".join(letters for letters in self.layers if len(letters) > 1)
        for mixer, letters in (("layers.*.mixer", alone), ("layers.*.mixer.*", beside)):
            if "*" in letters:
                plan |= {f"{mixer}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
                plan |= {f"{mixer}.o_proj": "rowwise"}
            if "-" in letters and "M" not in letters and not (gated and self.mlp_bias):
                plan |= {f"{mixer}.in_proj": columns, f"{mixer}.out_proj": "rowwise"}
            if "E" in letters:  # (experts, in, out): the axis before the last is Transformers' first of a matrix
                plan |= {f"{mixer}.experts.in_proj": last_axis, f"{mixer}.experts.out_proj": "colwise"}
                plan |= {f"{mixer}.experts": "moe_tp_experts"}
                if self.moe["shared_experts"]:
                    plan |= {f"{mixer}.shared.in_proj": columns, f"{mixer}.shared.out_proj": "rowwise"}
        return plan

    @property
    def layers(self) -> list[str]:
        """The letters of each layer, for the whole model."""
        return self.stack.layers  # type: ignore[attr-defined]  # assembled

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the whole pattern."""
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """Routed experts per layer ``E``, as Mixtral's users ask for them; without one, per projection inside Mamba."""
        return self._routings[0].experts

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts per token, of those that ``num_experts`` counts."""
        return self._routings[0].top_k

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the balance loss; 0 where no router has one. Who trains may set it, as TRL does."""
        return self.moe["balance_weight"] if any(moe.balance == "loss" for moe in self._routings) else 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, weight: float) -> None:
        if weight == self.router_aux_loss_coef:
            return
        if all(moe.balance != "loss" for moe in self._routings):
            balance = self._routings[0].balance
            raise ValueError(f"router_aux_loss_coef={weight} with moe.balance={balance}, which has no loss")
        self.moe["balance_weight"] = weight

    @property
    def _routings(self) -> list[Any]:
        """How the layers ``E`` route, and how routers inside Mamba do, of those that there are.

        Raises:
            AttributeError: there are none, as ``hasattr`` shall say.
        """
        moe, letters = self.routing, "".join(self.layers)
        inside = moe.inner.projections and letters.count("M") >= moe.inner.every
        routings = [moe] * ("E" in letters) + ([moe.inner_routing] if inside else [])
        if not routings:
            raise AttributeError(f"a model of pattern {self.pattern} has no experts")
        return routings


MoEMambaConfig.register_for_auto_class()  # save_pretrained writes this file, too
