"""Other versions of Transformers, each in a folder of its own beside the environment's torch.

A folder holds Transformers and those of its requirements that other versions of it want otherwise; the rest is the
environment's, and ``class_under_version.py`` checks that all requirements are met. Folders lie in the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

from tests import ROOT

HUB_0 = ("huggingface_hub==0.36.2", "tokenizers==0.22.2")
HUB_1 = ("huggingface_hub==1.33.0", "tokenizers==0.22.2")
HUB_2 = ("huggingface_hub==2.4.0", "tokenizers==0.23.3")
COMPANIONS = {
    "4.56.2": HUB_0,
    "4.57.6": HUB_0,
    "5.0.0": (*HUB_1, "typer-slim==0.24.0"),
    "5.10.4": HUB_1,
    "5.20.2": HUB_2,
    "5.23.0": HUB_2,
    "5.24.0": HUB_2,
}


def environment(version: str, cache: Path) -> dict[str, str]:
    """Variables of a process that imports this version, and this checkout's package; skips where it cannot be had.

    Args:
        version: of Transformers.
        cache: folder for what the process itself caches.
    """
    paths = [ROOT] if version == installed_version("transformers") else [_folder(version), ROOT]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HOME": str(cache / "home"),
        "HF_MODULES_CACHE": str(cache / "code"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _folder(version: str) -> Path:
    """The folder of this version, installed when it is not there yet."""
    packages = (f"transformers=={version}", *COMPANIONS[version])
    platform = (sys.implementation.cache_tag, sysconfig.get_platform())
    digest = hashlib.sha256("\0".join((*packages, *platform)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "moe_mamba" / "transformers" / f"{version}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="install-", dir=folder.parent))
    try:
        _install(packages, own)
        own.rename(folder)  # whole, or not at all
    except OSError:
        if not folder.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def _install(packages: tuple[str, ...], folder: Path) -> None:
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--retries=1", "--timeout=30"]
    command = [sys.executable, "-m", "pip", "install", "--target", str(folder), *options, *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr.strip()]
        pytest.skip(f"{packages[0]} could not be installed: {lines[-1]}")
