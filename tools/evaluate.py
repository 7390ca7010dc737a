"""Score a trained model on text, or on the tasks of EleutherAI's evaluation harness."""

import sys
from pathlib import Path

from moe_mamba.command_line import run_command
from moe_mamba.commands.evaluate import main

if __name__ == "__main__":
    # Of this folder nothing is imported, and it would hide the package `evaluate` from the harness's tasks.
    sys.path = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    run_command(main)
