"""How many sequences a device works on at once, when the configuration leaves it open."""

import torch

from moe_mamba.config import Config

# On a CPU, more tokens at once only fall out of the caches.
CPU_TOKENS = 4096
# Share of the GPU's free memory that activations may take; the rest is for gradients, moments and buffers.
GPU_SHARE = 0.5


def choose_micro_batch(config: Config, sequences: int, device: torch.device) -> int:
    """Sequences of a micro-step: a divisor of `sequences`, a rank's share of the global batch.

    Raises:
        UserError: `train.micro_batch` does not divide the share.
    """
    if config.train.micro_batch:
        return config.train.micro_batch
    length = config.data.sequence_length
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most = free * GPU_SHARE / (length * activation_bytes_per_token(config))
    else:
        most = CPU_TOKENS / length
    return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= max(1, most))


def activation_bytes_per_token(config: Config) -> int:
    """A rough, generous count of what the forward pass keeps for the backward one, in bytes a token."""
    model, moe = config.model, config.moe
    width = 2 if config.train.precision == "bf16" else 4
    top_k = moe.top_k + moe.shared_experts
    hidden = 2 if model.activation == "swiglu" else 1
    kept = {
        # x, z, convolution, delta, gate, scan output in the compute type; the scan's inputs also in fp32.
        "M": model.d_inner * (8 * width + 8),
        "*": model.d_model * 6 * width,
        "-": model.resolved_d_ff * (hidden + 2) * width,
        "E": top_k * ((moe.d_expert or model.resolved_d_ff) * (hidden + 2) + 2 * model.d_model) * width,
    }
    layers = sum(3 * model.d_model * width + (0 if config.train.recompute else kept[letter]) for letter in model.layers)
    # Logits, their fp32 copy and its gradient.
    return layers + model.vocab_size * (width + 8)
