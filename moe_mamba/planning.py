"""What a configuration means, before anything starts: parameters and work a token."""

import torch

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel


def plan(config: Config) -> dict[str, int]:
    """Count a model without allocating it.

    Returns:
        ``total_parameters`` and ``active_parameters`` (both without embedding, head and norms, as the paper counts),
        ``norm_parameters``, ``embedding_parameters`` (with the head), and ``training_flops_per_token`` (forward
        and backward, at ``data.sequence_length``; see ``LanguageModel.flops_per_token`` for the formula).
    """
    with torch.device("meta"):
        model = LanguageModel(config.model, config.moe)
    counts = {f"{name}_parameters": count for name, count in model.parameter_counts().items()}
    return counts | {"training_flops_per_token": model.flops_per_token(config.data.sequence_length)}


def table(config: Config) -> str:
    """Show a plan to people."""
    numbers = plan(config)
    tokens = config.steps * config.train.global_batch * config.data.sequence_length
    rows = [
        ("pattern", f"{config.model.pattern} x {config.model.repeat}"),
        ("parameters", f"{numbers['total_parameters']:,} without embedding, head and norms"),
        ("  active a token", f"{numbers['active_parameters']:,}"),
        ("  norms", f"{numbers['norm_parameters']:,}"),
        ("  embedding and head", f"{numbers['embedding_parameters']:,}"),
        ("training", f"{tokens:,} tokens in {config.steps:,} steps"),
        (
            "  work",
            f"{numbers['training_flops_per_token']:.3g} FLOPs a token, "
            f"{numbers['training_flops_per_token'] * tokens:.3g} in all",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
