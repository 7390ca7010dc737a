"""What a run is, and what of it lies on this rank: worked out once, before anything has memory."""

from dataclasses import dataclass

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.placement import ParameterShard, parameter_shards
from moe_mamba.parallel.topology import Topology


@dataclass(frozen=True)
class RunPlan:
    """A configuration in a layout, as one rank sees it.

    Attributes:
        config: of the run, with the size of the vocabulary.
        topology: the layout, and this rank's place in it.
        model: the whole model, on the meta device.
        shards: what this rank holds of each parameter and buffer, by its full name.
    """

    config: Config
    topology: Topology
    model: LanguageModel
    shards: dict[str, ParameterShard]

    @classmethod
    def of(cls, config: Config, topology: Topology) -> "RunPlan":
        """Work out the plan; the same on every rank but for what it holds."""
        model = LanguageModel.on_meta(config.model, config.moe, config.run.kernels)
        return cls(config, topology, model, parameter_shards(model, topology))
