"""Turn a dense model into a mixture of experts."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.upcycle import main

if __name__ == "__main__":
    run_command(main)
