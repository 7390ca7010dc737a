"""Draw the loss curves of one run or several in one picture."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.plot import main

if __name__ == "__main__":
    run_command(main)
