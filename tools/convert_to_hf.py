"""Turn a checkpoint into a folder that Transformers loads."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.convert_to_hf import main

if __name__ == "__main__":
    run_command(main)
