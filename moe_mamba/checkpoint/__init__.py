"""Checkpoints: sharded tensors in safetensors and JSON, through torch.distributed.checkpoint."""
