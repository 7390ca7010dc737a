"""Tiny models for the tests of model/."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from tests.designs import split


def _tiny(pattern: str, moe: dict[str, Any] | None = None, seed: int = 0, **model: Any) -> LanguageModel:
    pattern, inner = split(pattern)
    sizes = {"repeat": 1, "d_model": 16, "vocab_size": 31, "d_state": 4, "heads": 4, "d_ff": 24}
    config = ModelConfig(**{"pattern": pattern, **sizes, **model})
    routing = {"experts": 4, "capacity_factor": None, "inner": inner, **(moe or {})}
    built = LanguageModel(config, MoEConfig(**routing))
    initialize(built, seed)
    return built


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    """``tiny(pattern, moe={...}, seed=0, **model keys)``: an initialised model of width 16, dropless."""
    return _tiny
