"""A model on one device: torch, our kernels and the config, and nothing else."""
