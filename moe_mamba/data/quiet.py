"""Noisy libraries, used without their noise."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from types import ModuleType

from moe_mamba.lean_import import lean_import


@lru_cache(maxsize=1)
def indexed_dataset() -> ModuleType:
    """The module megatron.core.datasets.indexed_dataset. Its import takes seconds: call it where it is needed."""
    with lean_import():
        from megatron.core.datasets import indexed_dataset as module
    return module


def quiet_hub() -> AbstractContextManager[None]:
    """Without the hub client's line for each retry: its error says it once."""
    return _errors_only("huggingface_hub")


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
