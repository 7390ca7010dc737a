"""A checkpoint far larger than the memory that its conversion takes; a kill half-way."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.hf.formats import OWN
from moe_mamba.model.language_model import LanguageModel
from tests import ROOT
from tests.hf.checkpoints import make_run, save_run
from tools.convert_to_hf import main

JAMBA = {"activation": "swiglu", "positions": "none", "mamba_norms": True}
# The highest resident memory since the program started, only of it: ru_maxrss counts the parent's at the fork too.
MEASURED = """
import sys
from tools.convert_to_hf import main
main(*sys.argv[1:3], format=sys.argv[3])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024)
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")


def _make(path: Path, model: dict[str, Any], experts: int) -> int:
    """A run whose weights are the number of their tensor, each in two chunks; its bytes of weights."""
    config = Config(model=model, moe={"experts": experts, "capacity_factor": None})
    with torch.device("meta"):
        tensors = LanguageModel(config.model, config.moe).state_dict()
    shards = []
    for number, (name, tensor) in enumerate(tensors.items()):
        shape, half = tuple(tensor.shape), tensor.shape[-1] // 2
        for start, stop in ((0, half), (half, shape[-1])):
            offsets = (0,) * (len(shape) - 1) + (start,)
            chunk = torch.tensor(float(number)).expand(*shape[:-1], stop - start)
            shards.append(Shard(f"weights/{name}", shape, offsets, chunk))
    save_run(path, config, shards, BytesTokenizer())
    return sum(tensor.numel() * 4 for tensor in tensors.values())


def _peak(run: Path, out: Path, format: str) -> float:
    """MiB that a process has at most which converts."""
    command = [sys.executable, "-c", MEASURED, str(run), str(out), format]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB, most of it in four tensors."""
    path = tmp_path_factory.mktemp("large") / "run"
    assert _make(path, {"pattern": "ME", "repeat": 2, "d_model": 512, "d_ff": 2048, "vocab_size": 260}, 24) > 4e8
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "tiny", {"pattern": "ME"})
    tiny = _peak(tmp_path / "tiny", tmp_path / "tiny_out", "moe_mamba")
    assert _peak(run, tmp_path / "out", "moe_mamba") - tiny < 250
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for number, name in enumerate(_names(run)):
            found = file.get_slice(name)
            assert found[-1:].float().min() == found[:1].float().max() == number, name


def _names(run: Path) -> list[str]:
    from moe_mamba.config_file import load_config

    config = load_config(run / "config.yaml")
    return [entry.theirs for entry in OWN.entries(config.model, config.moe)]


@pytest.mark.slow
def test_a_kill_loses_nothing(run: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    out.mkdir()
    (out / "config.json").write_text("the model that was here")
    code = "import sys; from tools.convert_to_hf import main; main(*sys.argv[1:], overwrite=True)"
    converting = subprocess.Popen([sys.executable, "-c", code, str(run), str(out)], cwd=ROOT)
    try:
        while not any(path.stat().st_size > 2**20 for path in partial.glob("*.safetensors")):
            assert converting.poll() is None
            time.sleep(0.005)
    finally:
        converting.kill()
    assert converting.wait() == -signal.SIGKILL
    assert partial.is_dir() and (out / "config.json").read_text() == "the model that was here"
    make_run(tmp_path / "tiny", {"pattern": "ME"})
    main(str(tmp_path / "tiny"), str(out), overwrite=True)
    assert (out / "model.safetensors").is_file() and not partial.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "model"), [("moe_mamba", {"pattern": "ME"}), ("native", {"pattern": "M-*E", "d_ff": 5376} | JAMBA)]
)
def test_five_gigabytes(format: str, model: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"repeat": 2, "d_model": 2048, "d_ff": 8192, "vocab_size": 50304, "heads": 16}
    size = _make(tmp_path / "run", sizes | model, 16)
    assert size > 5e9
    start = time.monotonic()
    peak = _peak(tmp_path / "run", tmp_path / "out", format)
    print(f"{format}: {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s, at most {peak:.0f} MiB resident")
    for folder in ("run", "out"):  # pytest keeps folders of its last sessions
        shutil.rmtree(tmp_path / folder)
    assert peak < 1500e6 / 2**20
