"""Every package that the image for GPUs pins exists for its Python and its CUDA, at the index that pip asks here."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from packaging.utils import canonicalize_version

from tests import ROOT

PIN = re.compile(r"(?m)^([A-Za-z0-9_.-]+)==(\S+)$")
PYTHON = "3.12"  # of the image that docker/Dockerfile starts from
# Wheels for any C library from 2.5 to 2.28 on, under their newer and their older names.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(28, 4, -1)), "manylinux2014", "manylinux2010", "manylinux1")
# What their authors publish as sources only.
SOURCES = {"causal-conv1d", "deepspeed", "mamba-ssm", "rouge_score", "sqlitedict", "word2number"}


def versions(name: str) -> set[str]:
    """Versions that the index has for the image, unfinished ones too; 13.0.3.0 is 13.0.3."""
    kind = [] if name in SOURCES else ["--only-binary=:all:"]
    place = [f"--python-version={PYTHON}", *(f"--platform={platform}_x86_64" for platform in PLATFORMS)]
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", name, *(place if kind else []), *kind]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"(?m)^Available versions: (.*)$", done.stdout)
    return set(map(canonicalize_version, found[1].split(", "))) if found else set()


@pytest.mark.long
def test_every_pinned_package_exists() -> None:
    files = ("constraints.txt", "docker/constraints-cuda.txt")
    pins = dict(pin for file in files for pin in PIN.findall((ROOT / file).read_text()))
    assert len(pins) > 100 and pins["torch"] == "2.13.0" and pins["cuda-toolkit"].startswith("13.0.")
    assert versions("numpy"), "pip reaches no index"
    with ThreadPoolExecutor(4) as asking:
        found = dict(zip(pins, asking.map(versions, pins), strict=True))
    assert not {
        f"{name}=={version}" for name, version in pins.items() if canonicalize_version(version) not in found[name]
    }
