"""What the experts of trained models specialise in: ``python tools/experts.py runs/seed1 runs/seed2``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.experts import main

if __name__ == "__main__":
    run_command(main)
