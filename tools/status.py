"""Say how a run stands: ``python tools/status.py runs/demo``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.status import main

if __name__ == "__main__":
    run_command(main)
