"""Look at the machines before a run: `deepspeed launch/preflight.py`, or under any other launcher."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.preflight import main

if __name__ == "__main__":
    run_command(main)
