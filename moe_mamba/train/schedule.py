"""The learning rate as a pure function of the step."""

import math

from moe_mamba.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step`, counted from 1, of `steps`.

    Linear warm-up over `warmup` x steps; then a cosine to `minimum_rate` x peak (arXiv 2401.04081, Appendix), or
    the peak until the last `decay` x steps and a straight line to the same end (warm-up, stable, decay).
    """
    warmup = max(1, round(config.warmup * steps))
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = max(1, round(config.decay * steps))
        share = min(1.0, (steps - step) / decay)
    return config.learning_rate * (config.minimum_rate + (1 - config.minimum_rate) * share)
