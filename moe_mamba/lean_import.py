"""Libraries imported without what nothing here makes use of, which takes most of their time.

megatron-core and DeepSpeed's optimizer Muon hand functions to torch.compile when they are defined, which loads torch's
compilers; megatron-core looks for services (Weights & Biases, TensorBoard) besides. We use megatron-core's
mappings, embedding and data files (docs/design.md), none of which is among those functions or knows those services, and
neither Muon nor the kernels in Triton, both of which DeepSpeed imports with every engine.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SERVICES = ("wandb", "tensorboard", "torch.utils.tensorboard")


@contextmanager
def lean_import(*without: str) -> Iterator[None]:
    """Import such modules inside, also ``without`` other packages; what they warn of is not said."""
    hidden = [name for name in (*SERVICES, *without) if name not in sys.modules]
    compile_, logger = torch.compile, logging.getLogger("torch.utils.cpp_extension")  # warns of CUDA without a GPU
    level = logger.level
    try:
        torch.compile = _as_it_is  # type: ignore[assignment]
        for name in hidden:
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails at once
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]
        logger.setLevel(level)


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """In the place of torch.compile, as a decorator with or without arguments."""
    return function or (lambda decorated: decorated)
