"""Know a model before paying for it: ``python tools/plan.py --config configs/paper/moe_mamba_25m.yaml``."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.plan import main

if __name__ == "__main__":
    run_command(main)
