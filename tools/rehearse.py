"""One rank's step without the machines: ``python tools/rehearse.py --config FILE --gpus 1024 --rank 17``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.rehearse import main

if __name__ == "__main__":
    run_command(main)
