"""Make the paper's tables again: ``python tools/reproduce.py --table main``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.reproduce import main

if __name__ == "__main__":
    run_command(main)
