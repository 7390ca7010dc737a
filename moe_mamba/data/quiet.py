"""Two noisy libraries, used without their noise."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def indexed_dataset() -> ModuleType:
    """The module megatron.core.datasets.indexed_dataset. Its import takes seconds: call it where it is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from megatron.core.datasets import indexed_dataset as module
    return module


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub client's line for each retry: its error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
