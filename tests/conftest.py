"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

from tests import ROOT

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, and runs it on CPU tensors then
pytest_plugins = [
    "tests.world",
    "tests.fixtures_of_runs",
]  # a few gloo processes, shared by the session; small runs to look at
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real C4, Wikipedia and the GPT-2 vocabulary, where a checkout has them beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data folder beside this checkout")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
