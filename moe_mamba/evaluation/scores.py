"""Loss on text that was not trained on."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from moe_mamba.data.loader import Batch
from moe_mamba.kernels.cross_entropy import IGNORED
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import reduce_over_data
from moe_mamba.parallel.topology import Topology


@dataclass(frozen=True)
class Scores:
    """Of the `targets` tokens that were counted: cross entropy in nats each, and accuracy.

    A prediction is the argmax of the logits.
    """

    loss: float
    targets: int
    accuracy: float

    @property
    def perplexity(self) -> float:
        """Exponential of the loss: among how many tokens the model is as good as guessing."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float | None) -> float | None:
        """Bits that the model needs for a byte of the text, comparable over tokenizers; None: bytes are not known.

        Tokens that are not counted (a document's first, with document resets) are taken to cost as much as the mean.
        """
        return self.loss / math.log(2) / bytes_per_token if bytes_per_token else None


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    topology: Topology,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Cross entropy and accuracy of `model` on `batches`, which all ranks give alike and share among them.

    Routing is dropless, unless `moe.evaluation_capacity` says otherwise; experts that choose keep their capacity.

    Args:
        model: this rank's part of it.
        batches: of equal size.
        topology: how ranks share them.
        is_stopped: asked between batches, on every rank alike; True ends the evaluation.

    Returns:
        The scores, or None where it was stopped.
    """
    was_training = model.training
    model.eval()
    device = topology.world.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in _share(batches, topology):
        if is_stopped():
            model.train(was_training)
            return None
        batch = batch.to(device)
        output = model(batch.tokens, batch.document_starts, targets=batch.targets)
        count = (batch.targets != IGNORED).sum()
        sums += torch.stack([output.cross_entropy.double(), count.double(), output.right.double()])
    model.train(was_training)
    loss, targets, right = reduce_over_data(sums, topology).tolist()
    return Scores(loss / max(1.0, targets), round(targets), right / max(1.0, targets))


def _share(batches: Iterable[Batch], topology: Topology) -> Iterator[Batch]:
    """This rank's batches; as many as every rank's, because ranks that share a layer enter it together."""
    iterator = iter(batches)
    while turn := list(islice(iterator, topology.data)):
        yield turn[topology.data_rank] if topology.data_rank < len(turn) else turn[0].uncounted()
