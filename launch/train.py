"""Train a model: `deepspeed launch/train.py`, `torchrun launch/train.py`, or plain `python launch/train.py`."""

from moe_mamba.command_line import run_command
from moe_mamba.commands.train import main as train

if __name__ == "__main__":
    run_command(train)
