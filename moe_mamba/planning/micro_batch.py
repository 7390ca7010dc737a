"""How many sequences a device processes at once, when the configuration leaves it open."""

import torch

from moe_mamba.config import Config
from moe_mamba.kernels.cross_entropy.linear import CHUNK
from moe_mamba.model.pattern import layer_specs
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.memory import per_device

# On a CPU, more tokens at once only fall out of the caches.
CPU_TOKENS = 4096
# Share of the memory left beside weights, gradients and moments that activations may take.
GPU_SHARE = 0.6


def choose_micro_batch(plan: RunPlan) -> int:
    """Sequences of a micro-step: a divisor of a data rank's share of the batch that tensor-parallel ranks can share.

    On a GPU it follows from the memory that is free before the model lies there, so the choice of one rank must be
    given to all.
    """
    config, topology = plan.config, plan.topology
    share = topology.sequences_per_data_rank(config.train.global_batch, config.train.micro_batch)
    if config.train.micro_batch:
        return config.train.micro_batch
    length, device = config.data.sequence_length, topology.world.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        state = per_device(plan)
        free -= sum(state[kind] for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"))
        free -= head_bytes(config, topology.tensor)
        most = free * GPU_SHARE / (length * activation_bytes_per_token(config, topology.tensor))
    else:
        most = CPU_TOKENS / length
    multiple = topology.micro_batch_multiple(config)
    fitting = [n for n in range(multiple, share + 1, multiple) if share % n == 0]
    return max((n for n in fitting if n <= most), default=fitting[0])


def activation_bytes_per_token(config: Config, tensor: int = 1) -> int:
    """A rough, generous count of what the forward pass keeps for the backward one on a device, in bytes per token.

    Tensor-parallel ranks share all but the input of a mixer, which each gathers whole.
    """
    model, recompute = config.model, config.train.recompute
    width = 2 if config.train.precision == "bf16" else 4
    specs = layer_specs(model, config.moe)
    mixers = [mixer for spec in specs for mixer in spec.mixers]
    kept = 0 if recompute else sum(mixer.activation_bytes(model, config.moe, width) for mixer in mixers)
    layers = 3 * model.d_model * width * len(specs) + kept
    gathered = 0 if tensor == 1 or recompute else model.d_model * width * len(specs)
    head = 2 * model.d_model * width  # the normalised stream and its gradient; logits are in chunks
    return (layers + head) // tensor + gathered


def head_bytes(config: Config, tensor: int = 1) -> int:
    """What the head and the loss hold on a device, whatever the number of tokens.

    Two chunks, of logits and of their gradient, and the weight's gradient, in fp32 and as the engine takes it over.
    """
    model = config.model
    return 2 * CHUNK + 2 * 4 * model.vocab_size * model.d_model // tensor
