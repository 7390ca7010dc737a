"""Code can be renamed: initial weights and checkpoints know parameters by the names that their modules declare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moe_mamba.checkpoint import store
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import Initializer, initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers import MIXERS
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.sharding import ShardSpecs
from moe_mamba.parallel.placement import parameter_shards
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.run.restore import load_weights, weight_shards

Tiny = Callable[..., LanguageModel]
OURS, THEIRS = "in_proj.weight", "enter.weight"


class Renamed(FeedForward):
    """A feed-forward layer whose ``in_proj`` has become ``enter``."""

    logical_names = {"enter": "in_proj"}  # noqa: RUF012

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        self.enter = self.in_proj
        del self.in_proj

    def initializers(self) -> dict[str, Initializer]:
        self.in_proj = self.enter  # for the class above
        fills = super().initializers()
        del self.in_proj
        return {THEIRS if name == OURS else name: fill for name, fill in fills.items()}

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        return {THEIRS if name == OURS else name: spec for name, spec in super().shard_specs(config, moe).items()}


def renamed(model: LanguageModel) -> LanguageModel:
    """The same model with other attributes, and weights that nothing has filled."""
    with mock.patch.dict(MIXERS, {FeedForward.letter: Renamed}):
        other = LanguageModel(model.config, model.moe_config)
    assert "layers.1.mixer.enter.weight" in other.state_dict()
    return other


def test_initial_weights_follow_from_logical_names(tiny: Tiny) -> None:
    before = tiny("M-")
    after = renamed(before)
    initialize(after, 0)
    assert after.logical_tensors().keys() == before.logical_tensors().keys() == before.state_dict().keys()
    for name, tensor in before.logical_tensors().items():
        assert torch.equal(after.logical_tensors()[name], tensor), name


def test_checkpoints_are_read_by_logical_names(tiny: Tiny, tmp_path: Path) -> None:
    before = tiny("M-", seed=3)
    after = renamed(before)
    load_weights(after, store.save(tmp_path, 1, weight_shards(before), {}))
    for name, tensor in before.logical_tensors().items():
        assert torch.equal(after.logical_tensors()[name], tensor), name


def test_ranks_hold_shards_of_logical_tensors(tiny: Tiny) -> None:
    before = tiny("M-")
    topology = Topology(World(1, 2, 0, 1), tensor=2)
    with mock.patch.dict(MIXERS, {FeedForward.letter: Renamed}):  # the registry says how each is sharded
        shards = parameter_shards(renamed(before), topology)
    assert shards["layers.1.mixer.enter.weight"] == parameter_shards(before, topology)["layers.1.mixer.in_proj.weight"]
