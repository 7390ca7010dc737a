"""What a run does not use is not imported."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT

IMPORT = """
import sys, torch
compile_ = torch.compile
from moe_mamba.data.quiet import indexed_dataset
indexed_dataset()
import moe_mamba.parallel.tensor, moe_mamba.parallel.expert, moe_mamba.parallel.engine
assert torch.compile is compile_
unused = ("torch._dynamo", "torch._inductor.compile_fx", "wandb", "torch.utils.tensorboard")
loaded = [name for name in unused if name in sys.modules]
assert not loaded, loaded
import wandb  # whoever asks for it gets it
"""
RUN = """
import sys
from moe_mamba.command_line import run_command
from moe_mamba.commands.train import main
run_command(main)
unused = ("wandb", "tensorboard", "torch._dynamo", "triton", "setuptools", "transformers", "datasets", "matplotlib")
loaded = [name for name in unused if name in sys.modules]
assert not loaded, loaded
"""


def test_megatron_and_deepspeed_bring_no_compiler_and_no_service() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_is_used_without_what_trains_it() -> None:
    """Both speak on standard output when they are imported."""
    script = "import sys, moe_mamba.commands.evaluate, moe_mamba.commands.generate, moe_mamba.run.inference\n"
    script += "assert not {'deepspeed', 'megatron'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("plain")  # its text is sharded, for which megatron-core is imported
def test_a_run_imports_nothing_that_it_does_not_use(tiny: Path, tmp_path: Path) -> None:
    flags = ("--train.steps=1", "--train.sample_tokens=0", "--logging.plots=false")
    command = [sys.executable, "-c", RUN, f"--config={tiny}", f"--run.folder={tmp_path / 'run'}", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (parts,) = (event["seconds"] for event in events if event["event"] == "first_step")
    assert 0.5 * seconds < sum(parts.values()) < seconds + 0.05
    assert parts["imports"] == max(parts.values())
