"""Write text with a trained model."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.generate import main

if __name__ == "__main__":
    run_command(main)
