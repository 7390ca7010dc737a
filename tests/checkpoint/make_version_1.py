"""Made the checkpoints in version_1/, with the last code before the package was reorganised.

    python tests/checkpoint/make_version_1.py CHECKOUT [NAME ...]

CHECKOUT is a checkout of commit 5446fe3, or of another one that writes format version 1. Each archive in version_1/
holds a run's folder as that code left it after 3 of 6 steps, the optimizer's state included, and expected.json: the
losses of the other 3 steps by the same code, and what its tools/convert_to_hf.py wrote (of tensors the SHA-256). The
models train on a synthetic task, which needs no file and has 9 token ids, so that an archive has a few KB, and with
kernels in plain torch, which are not compiled for one machine.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "version_1"
SAVED, STEPS = 3, 6
TWO_RANKS = "all_kinds_tp2_ep2"
TINY: dict[str, dict[str, Any]] = {
    "run": {"folder": "run"},
    "model": {"repeat": 1, "d_model": 8, "d_state": 2, "heads": 2, "vocab_size": 9, "kernels": "torch"},
    "moe": {"experts": 2, "d_expert": 8, "capacity_factor": None},
    "data": {
        "train": ["synthetic:selective_copying:memorize=4"],
        "validation": ["synthetic:selective_copying:memorize=4:sequences=8"],
        "tokenizer": "symbols",
        "sequence_length": 16,
    },
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "learning_rate": 0.01, "validate_every": 0}
    | {"sample_tokens": 0},
    "checkpoint": {"every": SAVED},
}
ALL_KINDS = {"pattern": "MEM-*E", "mamba_norms": True, "kv_heads": 1, "tied_head": True}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "mamba": {"model": {"pattern": "M"}},
    "moe_mamba": {"model": {"pattern": "ME"}},
    "mamba_mlp": {"model": {"pattern": "M-"}},
    "transformer": {"model": {"pattern": "*-"}},
    "transformer_moe": {"model": {"pattern": "*E"}},
    TWO_RANKS: {"model": ALL_KINDS},
    "shared_experts_balanced_by_bias": {
        "model": {"pattern": "ME", "activation": "swiglu"},
        "moe": {"router": "top_k", "top_k": 2, "renormalize": True, "scores": "sigmoid", "balance": "bias"}
        | {"experts": 4, "shared_experts": 1},
    },
    "expert_choice": {
        "model": {"pattern": "ME"},
        "moe": {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none"},
    },
}


def make(checkout: Path, name: str, work: Path) -> None:
    """Train, save, go on, export, and pack the run with what a test compares with."""
    tree = {section: values | CASES[name].get(section, {}) for section, values in TINY.items()}
    (work / "config.yaml").write_text(yaml.safe_dump(tree))
    train = [str(checkout / "launch" / "train.py"), "--config=config.yaml"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *train]
    two += ["--parallel.tensor=2", "--parallel.expert=2"]
    python(checkout, work, *(two if name == TWO_RANKS else train))
    run = work / "run"
    for aside in ("plots", f"checkpoints/step-{STEPS:08d}"):
        shutil.rmtree(run / aside)
    for aside in ("metrics.jsonl", "log.txt", "checkpoints/best.json", f"checkpoints/step-{SAVED:08d}/next_step.json"):
        (run / aside).unlink()
    shutil.copytree(run, work / "packed" / "run")

    export = [str(checkout / "tools" / "convert_to_hf.py"), "--checkpoint=run", "--output=export"]
    python(checkout, work, *export, *(["--scoring_only"] if name == "expert_choice" else []))
    python(checkout, work, *train)  # one process, whatever the layout of the first steps
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "config": json.loads((work / "export" / "config.json").read_text()),
        "tensors": fingerprints(work / "export"),
    }
    (work / "packed" / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.make_archive(str(FOLDER / name), "zip", work / "packed")


def python(checkout: Path, work: Path, *arguments: str) -> None:
    """Run a command of the checkout; in the working folder, so that no path of this machine is written."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=work, env=environment, check=True)


def fingerprints(folder: Path) -> dict[str, list[Any]]:
    """Name of each tensor of an exported model -> dtype, shape and SHA-256 of its bytes."""
    return {
        name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in sys.argv[2:] or CASES:
        with tempfile.TemporaryDirectory() as work:
            make(Path(sys.argv[1]).resolve(), case, Path(work))
