"""What a micro-step keeps and takes on a rank, by what the mixers declare (``model/tape.py``).

The peak is sought over the whole micro-step: forward, in the head (whose gradients are made with the loss), and in
every layer's backward pass, when all layers before it still keep theirs. With recomputation layers keep only their
inputs, and one layer at a time keeps all.

Within 10 % of a tracker of all tensors (``tests/planning/test_activations.py``). Left out: what
``model/tape.py`` leaves out, the batch itself, statistics of routers, and the copies in fp32 that a CPU without
instructions for bf16 makes of the matrices of a product.
"""

from dataclasses import dataclass, replace

from moe_mamba.model.costs import embedding_bytes, head_peak, layer_peak
from moe_mamba.model.pattern import LayerSpec, layer_specs
from moe_mamba.model.tape import Peak, Tape
from moe_mamba.model.work import Share
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.load import Load
from moe_mamba.planning.state import BF16, FP32
from moe_mamba.planning.traffic import name_of, share_of


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank.

    Attributes:
        kept: by all layers and the head, from the forward to the backward pass.
        peak: at most at any moment of the micro-step, with gradients of activations and of one weight on their way.
    """

    kept: int
    peak: int


def activations_of(
    plan: RunPlan, micro_batch: int, load: Load, device: str = "cuda", hidden: bool = True
) -> Activations:
    """What a micro-step keeps and takes on the rank of an expert group whose rows take most.

    A load has its first expert the fullest, so it is the first rank; one that a run has recorded differs from layer to
    layer, and all ranks of the group are asked.

    Args:
        plan: of the run.
        micro_batch: sequences of a micro-step of a group of tensor-parallel ranks.
        load: how rows spread over experts.
        device: type of the device: on ``cuda`` Triton's kernels run, unless ``run.kernels`` says otherwise.
        hidden: whether to count what back ends take inside a call, which no tracker of tensors sees.
    """
    found = [_on_rank(place, micro_batch, load, device, hidden) for place in _places(plan, load)]
    return Activations(max(one.kept for one in found), max(one.peak for one in found))


def _places(plan: RunPlan, load: Load) -> list[RunPlan]:
    """The plan as ranks see it that have different experts, as far as these differ in what comes to them."""
    topology = plan.topology
    several = topology.tensor * topology.expert * topology.inner_expert if load.recorded is not None else 1
    ranks = range(min(topology.world.size, several))
    places = (replace(topology, world=replace(topology.world, rank=rank)) for rank in ranks)
    different = {(place.expert_rank, place.inner_expert_rank): place for place in places}
    return [replace(plan, topology=place) for place in different.values()]


def _on_rank(plan: RunPlan, micro_batch: int, load: Load, device: str, hidden: bool) -> Activations:
    """As ``activations_of``, on the rank of ``plan``."""
    config = plan.config
    micro_step = _MicroStep(plan, micro_batch, load, device, hidden)
    first = micro_step.stream + embedding_bytes(micro_step.share(""))
    specs, recompute = layer_specs(config.model, config.moe), config.train.recompute
    layers = [micro_step.layer(spec, index) for index, spec in enumerate(specs)]
    before, peak = [first], first
    for index, layer in enumerate(layers):  # forward
        peak = max(peak, before[-1] + layer.forward)
        # What a layer gets is kept, where it is computed again; the first gets what the embedding made.
        kept = layer.kept if not recompute else micro_step.stream if index < len(layers) - 1 else 0
        before.append(before[-1] + kept)
    head = head_peak(config.model, micro_step.share(""), micro_step.tape(), micro_step.rows)
    peak = max(peak, before[-1] + head.forward, before[-1] + head.backward)
    for kept, layer in zip(before, layers, strict=False):
        peak = max(peak, kept + max(layer.again if recompute else 0, layer.backward))
    return Activations(before[-1] + head.kept, peak)


class _MicroStep:
    """The sizes of a micro-step, and its layers, each kind counted once."""

    def __init__(self, plan: RunPlan, micro_batch: int, load: Load, device: str, hidden: bool) -> None:
        self._plan, self._batch, self._load, self._hidden = plan, micro_batch, load, hidden
        config = plan.config
        self._width = BF16 if config.train.precision == "bf16" else FP32
        self._fused = device == "cuda" and config.run.kernels in ("auto", "triton")
        self._on_cpu = device == "cpu"
        self._layers: dict[tuple[LayerSpec, bool, str], Peak] = {}
        self.rows = plan.shards["embedding.weight"].local_shape[0]
        tokens = micro_batch * config.data.sequence_length // plan.topology.tensor
        self.stream = tokens * config.model.d_model * self._width

    def tape(self) -> Tape:
        """An empty one."""
        is_sharded = self._plan.config.parallel.zero == 3
        return Tape(self._width, self._fused, self._hidden, is_sharded, self._on_cpu)

    def layer(self, spec: LayerSpec, index: int) -> Peak:
        """What a layer keeps and takes; recorded loads differ from layer to layer."""
        config = self._plan.config
        merged = config.train.recompute or index == 0
        prefix = f"layers.{index}.mixer" if self._load.recorded is not None else ""
        key = spec, merged, prefix
        if key not in self._layers:
            shares = [self.share(name_of(prefix, place, spec.mixers)) for place in range(len(spec.mixers))]
            self._layers[key] = layer_peak(spec.mixers, config.model, config.moe, shares, self.tape(), merged)
        return self._layers[key]

    def share(self, prefix: str = "") -> Share:
        """Sizes of this rank's part, of the mixer of this name."""
        return share_of(self._plan, self._batch, self._load, prefix)
