"""Shard C4, or any other documents, into Megatron's .bin/.idx: see ``main``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.preprocess_c4 import main

if __name__ == "__main__":
    run_command(main)
