"""Bring a model in: a Hugging Face folder becomes a run's folder."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.convert_from_hf import main

if __name__ == "__main__":
    run_command(main)
