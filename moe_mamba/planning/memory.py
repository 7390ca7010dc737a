"""What a configuration means, before anything starts: parameters, FLOPs per token, and what each device holds.

Arithmetic on the meta device: nothing is allocated and no process group is made.

Of a GPU's memory a run cannot use all: the caching allocator keeps blocks that are larger than what they hold, and gaps
between them. ``FRAGMENTATION`` is the share of what comes and goes (activations, gradients on their way, buffers) that
is set aside for that. It is a choice, not a measurement of ours: PyTorch's allocator rounds a block of 1 to 10 MB up to
20 MB and larger ones to 2 MB (``c10/cuda/CUDACachingAllocator.cpp``), and with
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` mostly that rounding is left. A CPU's allocator gives pages back.
"""

import math
from dataclasses import dataclass

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.pattern import describe, has_experts
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.activations import activations_of
from moe_mamba.planning.load import Load
from moe_mamba.planning.state import FP32, state_of

FRAGMENTATION = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs, by kind.

    Attributes:
        weights: with buffers, and what ZeRO-3 leaves gathered between passes.
        gradients: as they are accumulated, from pass to pass.
        optimizer: moments and masters on the device.
        activations: of a micro-step, at their peak: what is kept, and gradients of activations on their way.
        communication: ZeRO's buckets, what reducing one takes, and weights that ZeRO-3 has gathered.
        update: what reducing gradients and stepping need when activations and the pass's buffers are gone.
        fragmentation: a share set aside on GPUs.
        host: of the CPU, for an offloaded optimizer.
        parameters: how many the rank holds; no bytes.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    update: int
    fragmentation: int
    host: int
    parameters: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Of the device, at the peak of a step."""
        return sum(self.at_peak.values())

    @property
    def at_peak(self) -> dict[str, int]:
        """Kind -> bytes when most is taken: in the passes, or in the update, when what the passes took is gone."""
        in_passes = self.activations + self.communication >= self.update
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations * in_passes,
            "communication": self.communication * in_passes,
            "update": self.update * (not in_passes),
            "fragmentation": self.fragmentation,
        }


def memory_of(run_plan: RunPlan, micro_batch: int, load: Load, *, is_gpu: bool = True) -> Memory:
    """What a rank needs: the one whose experts get most rows, and that keeps most gradients.

    Args:
        run_plan: of the run.
        micro_batch: sequences of a micro-step of a group of tensor-parallel ranks.
        load: how rows spread over experts.
        is_gpu: whether a GPU trains; else a CPU.
    """
    device = "cuda" if is_gpu else "cpu"
    config, data = run_plan.config, run_plan.topology.data
    state = state_of(run_plan, device, config.train.global_batch // (data * micro_batch))
    activations = activations_of(run_plan, micro_batch, load, device).peak
    share = FRAGMENTATION if is_gpu else 0.0
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=activations,
        communication=state.buckets,
        update=state.update,
        fragmentation=math.ceil(share * max(activations + state.buckets, state.update)),
        host=state.host,
        parameters=state.parameters,
    )


def plan(config: Config, gpus: int | None = None) -> dict[str, int]:
    """Count a model without allocating it, and what a device of its layout holds.

    Args:
        config: of the run.
        gpus: devices; None: the fewest that the layout can be made of.

    Returns:
        ``total_parameters`` and ``active_parameters`` (both without embedding, head and norms, as the paper counts),
        ``norm_parameters``, ``embedding_parameters`` (with the head), ``training_flops_per_token`` (forward and
        backward, at ``data.sequence_length``; see ``LanguageModel.flops_per_token`` for the formula), ``devices`` and
        what ``per_device`` says of one.

    Raises:
        UserError: model or batch do not fit the layout, as training would say.
    """
    run_plan = RunPlan.of(config, layout(config, gpus))
    model = run_plan.model
    counts = {f"{name}_parameters": count for name, count in model.parameter_counts().items()}
    counts["training_flops_per_token"] = model.flops_per_token(config.data.sequence_length)
    return counts | {"devices": run_plan.topology.world.size} | per_device(run_plan)


def layout(config: Config, gpus: int | None = None) -> Topology:
    """The layout of ``config`` on ``gpus`` devices, or on the fewest; refused as training would."""
    parallel = config.parallel
    fewest = math.lcm(parallel.tensor, parallel.expert)
    if parallel.expert_tensor:
        fewest = parallel.tensor * parallel.expert
    topology = Topology.of(config, World(rank=0, size=gpus or fewest, local_rank=0, local_size=1))
    check_shards(config, topology)
    return topology


def per_device(run_plan: RunPlan) -> dict[str, int]:
    """What a device keeps from step to step; activations and buffers come on top. See ``state.py``.

    Returns:
        ``parameters_per_device``; ``weight_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` (AdamW's two moments
        and, with ZeRO, fp32 masters) on the device; ``host_bytes`` that an offloaded optimizer takes.
    """
    state = state_of(run_plan, "cuda")
    return {
        "parameters_per_device": state.parameters,
        "weight_bytes": state.weights,
        "gradient_bytes": state.gradients,
        "optimizer_bytes": state.optimizer,
        "host_bytes": state.host,
    }


def checkpoint_bytes(model: LanguageModel) -> int:
    """What a checkpoint takes on the disk: fp32 weights and AdamW's two moments, each once, whatever the layout."""
    return 3 * FP32 * sum(parameter.numel() for parameter in model.parameters())


def table(config: Config, gpus: int | None = None) -> str:
    """Show a plan to people."""
    numbers = plan(config, gpus)
    tokens = config.steps * config.train.global_batch * config.data.sequence_length
    rows = [
        ("pattern", describe(config.model, config.moe)),
        ("parameters", f"{numbers['total_parameters']:,} without embedding, head and norms"),
        ("  active per token", f"{numbers['active_parameters']:,}"),
        ("  norms", f"{numbers['norm_parameters']:,}"),
        ("  embedding and head", f"{numbers['embedding_parameters']:,}"),
        ("training", f"{tokens:,} tokens in {config.steps:,} steps"),
        (
            "  work",
            f"{numbers['training_flops_per_token']:.3g} FLOPs per token, "
            f"{numbers['training_flops_per_token'] * tokens:.3g} in all",
        ),
        *_layout_rows(config, numbers),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _layout_rows(config: Config, numbers: dict[str, int]) -> list[tuple[str, str]]:
    parallel, devices = config.parallel, numbers["devices"]
    experts = f", experts over {parallel.expert}" * has_experts(config.model, config.moe)
    among = " and their tensor-parallel ranks" * parallel.expert_tensor
    kinds = {"weights": "weight_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes"}
    masters = "fp32 masters and moments" if parallel.zero else "moments"
    notes = {"weights": "", "gradients": "", "optimizer": f", {masters}"}
    if parallel.offload_optimizer:
        del kinds["optimizer"]
    total = sum(numbers[key] for key in kinds.values())
    rows = [
        ("layout", f"{devices} devices, tensor {parallel.tensor} x data {devices // parallel.tensor}{experts}{among}"),
        ("  precision", f"{config.train.precision}, ZeRO {parallel.zero}"),
        ("  parameters", f"{numbers['parameters_per_device']:,} per device, embedding, head and padding included"),
        *((f"  {name}", f"{size(numbers[key])} per device{notes[name]}") for name, key in kinds.items()),
        ("  together", f"{size(total)} per device, without activations"),
    ]
    if parallel.offload_optimizer:
        rows.append(("  offloaded", f"{size(numbers['host_bytes'])} of the CPU's memory per device, {masters}"))
    return rows


def size(count: int) -> str:
    """Bytes for people, in powers of 1,024."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:,.0f} {units[0]}"
