"""What scores of a batch move between tensor-parallel ranks; what training does is looked at with its plan."""

from collections import Counter

import torch

from moe_mamba.config import Config
from tests.parallel.communication import Collective, counting
from tests.parallel.layouts import GLOBAL_BATCH, LENGTH, Layout, batch_of, build, config_of
from tests.world import World

FP32, INT64 = 4, 8


def validation(config: Config) -> list[Collective]:
    """In a worker: what scores of a batch move, without gradients."""
    built = build(config)
    tokens, targets, document_starts = batch_of(0, config)
    with counting() as found, torch.no_grad():
        built.model.eval()(tokens, document_starts, targets=targets)
    return found


def test_scores_move_four_numbers_of_each_token(world: World) -> None:
    """Of the loss the maximum, the target's logit and the sum; of the argmax the maximum, and an id of 8 bytes."""
    config = config_of("-", Layout(2, 2))
    tokens = GLOBAL_BATCH * LENGTH
    sizes = Counter({tokens * FP32: 2, 2 * tokens * FP32: 1}) + Counter({tokens * INT64: 1})
    for found in world.run(validation, config, ranks=2):
        assert Counter(call.bytes for call in found if call.kind == "all-reduce") == sizes
