"""What a configuration means, before anything starts: parameters, FLOPs per token, and what each device holds.

Arithmetic on the meta device: nothing is allocated and no process group is made.
"""

import math

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.pattern import describe, has_experts
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.state import FP32, state_of


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
