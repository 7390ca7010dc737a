"""What has a precision of its own, whatever an autocast around the model says."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function whose operations name their dtypes outside of autocast, which would cast their products.

    Args:
        function: one of its positional arguments is a tensor, which says the type of the device.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
