"""Our own class in Transformers: every model that trains, under its own names."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import InnerConfig, ModelConfig, MoEConfig
from moe_mamba.errors import brief
from moe_mamba.hf.formats.base import Entry, build, same
from moe_mamba.hf.formats.settings import Configuration, Settings
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.names import logical_names
from moe_mamba.model.pattern import kinds

CLASSES = {
    "AutoModel": "MoEMambaModel",
    "AutoModelForCausalLM": "MoEMambaForCausalLM",
    "AutoModelForSequenceClassification": "MoEMambaForSequenceClassification",
}
"""What Transformers' Auto classes load -> the class of the modeling file."""


class Own:
    """``MoEMambaForCausalLM``, whose code lies beside the weights; see hf/configuration_moe_mamba.py."""

    name = "moe_mamba"
    architecture = "MoEMambaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """It holds every model of this package's mixers, from which its code is assembled."""
        package = __name__.partition(".")[0]
        foreign = [mixer for mixer in kinds(model, moe) if mixer.__module__.partition(".")[0] != package]
        if not foreign:
            return None
        return (
            f"model.pattern={model.pattern} has the layer {foreign[0].letter} of {foreign[0].__module__}, which the "
            "exported code would lack: move the mixer into moe_mamba/model/mixers and run tools/assemble_hf.py"
        )

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """Our keys, flat, and the experts' in a section of their own."""
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "auto_map": {
                "AutoConfig": "configuration_moe_mamba.MoEMambaConfig",
                **{auto: f"modeling_moe_mamba.{name}" for auto, name in CLASSES.items()},
            },
            **model.model_dump(),
            "moe": moe.model_dump(),
            "tie_word_embeddings": model.tied_head,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        with Settings(configuration, self.architecture) as settings:
            model = settings.given(ModelConfig.model_fields.keys())
            section = settings.section("moe")
            moe = section.given(MoEConfig.model_fields)
            if "inner" in moe:
                moe["inner"] = section.section("inner").given(InnerConfig.model_fields)
            tied = model.get("tied_head", False)
            settings.require({"tie_word_embeddings": tied}, f"tied_head={brief(tied, 20)} says otherwise")
            return build(model, moe)

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        built = LanguageModel.on_meta(model, moe)
        names = logical_names(built)
        return (
            same(f"model.{path}" if path != "head.weight" else "lm_head.weight", names[path])
            for path in built.state_dict()
        )
