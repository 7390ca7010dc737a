"""Training: the loop, its schedule, checkpoints, metrics and plots."""
