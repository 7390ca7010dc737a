"""Say what is inside a checkpoint, and whether it is valid."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.inspect_checkpoint import main

if __name__ == "__main__":
    run_command(main)
