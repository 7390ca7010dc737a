"""Every command behind one: ``moe-mamba train``, ``moe-mamba generate``; ``python -m moe_mamba train`` is the same."""

import sys
from importlib import import_module

from moe_mamba.command_line import parse, run_to_one_line
from moe_mamba.errors import UserError, shown

COMMANDS = {
    "train": "train a model, or go on with a run where it stopped",
    "status": "say how a run stands: how far it is, and what happened to it",
    "preflight": "say what is wrong with the machines before a run, and measure them",
    "plan": "parameters, FLOPs and memory of a configuration, before anything starts",
    "rehearse": "one training step of one rank of a large job, without its machines",
    "preprocess_c4": "shard C4, or any other documents",
    "generate": "write text with a trained model",
    "evaluate": "score a trained model on text, or on the tasks of EleutherAI's harness",
    "convert_to_hf": "turn a checkpoint into a folder that Transformers loads",
    "convert_from_hf": "turn a Hugging Face folder into a run's folder",
    "upcycle": "turn a dense model into a mixture of experts",
    "experts": "say what the experts of trained models specialise in",
    "reproduce": "make the paper's tables again: runs, table, pictures, report",
    "plot": "draw the loss curves of runs in one picture",
    "inspect_checkpoint": "check a checkpoint, and say what it holds",
}


def main() -> None:
    """Run the command that the first argument names; ``--help`` after it lists its flags."""
    run_to_one_line(_run)


def _run() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("moe-mamba COMMAND [--flag=value ...]; moe-mamba COMMAND --help lists its flags\n")
        print("\n".join(f"  {command:<{width}}  {what}" for command, what in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise UserError(f"moe-mamba has no command {shown(name)}: choose among {', '.join(COMMANDS)}")
    sys.argv[:2] = [f"moe-mamba {name}"]
    parse(import_module(f"moe_mamba.commands.{name}").main)()


if __name__ == "__main__":
    main()
