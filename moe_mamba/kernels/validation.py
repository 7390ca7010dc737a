"""What the operations' inputs must look like, said in one line when they do not."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_mamba.errors import UserError


def require_shapes(operation: str, arguments: Iterable[tuple[str, Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse the first argument whose shape is not the one beside it; an argument that is None is left out.

    Raises:
        UserError: names the operation, the argument, its shape and the shape it must have.
    """
    for name, tensor, shape in arguments:
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"{operation}: {name} has shape {tuple(tensor.shape)}, and must have {shape}")


def require_dimensions(operation: str, name: str, tensor: Tensor, letters: str) -> None:
    """Refuse a tensor that does not have one dimension per word of ``letters``, such as ``batch length channels``.

    Raises:
        UserError: names the operation, the argument, its shape and its dimensions.
    """
    if tensor.dim() != len(letters.split()):
        expected = ", ".join(letters.split())
        raise UserError(f"{operation}: {name} has shape {tuple(tensor.shape)}, and must be ({expected})")


def require_same_dtype(operation: str, dtype: torch.dtype, arguments: Iterable[tuple[str, Tensor | None]]) -> None:
    """Refuse the first argument of another dtype than ``dtype``.

    Raises:
        UserError: names the operation, the argument and both dtypes.
    """
    for name, tensor in arguments:
        if tensor is not None and tensor.dtype != dtype:
            raise UserError(f"{operation}: {name} is {tensor.dtype}, and must be {dtype} like the first argument")


def require_wide_dtype(operation: str, dtype: torch.dtype, arguments: Iterable[tuple[str, Tensor | None]]) -> None:
    """Refuse the first argument that is neither of ``dtype`` nor of the one that it is computed in, fp32 at least.

    Raises:
        UserError: names the operation, the argument, its dtype and the two.
    """
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in arguments:
        if tensor is not None and tensor.dtype not in (dtype, wide):
            allowed = f"{dtype} like the first argument" + (f", or {wide}" if wide != dtype else "")
            raise UserError(f"{operation}: {name} is {tensor.dtype}, and must be {allowed}")


def require_one_device(operation: str, first: Tensor, arguments: Iterable[tuple[str, Tensor | None]]) -> None:
    """Refuse the first argument that lies on another device than ``first``.

    Raises:
        UserError: names the operation, the argument and both devices.
    """
    device = first.device
    for name, tensor in arguments:
        if tensor is not None and tensor.device != device:
            raise UserError(f"{operation}: {name} is on {tensor.device}, and must be on {device} like the first")


def require_entries(operation: str, name: str, tensor: Tensor) -> None:
    """Refuse an empty tensor.

    Raises:
        UserError: names the operation, the argument and its shape.
    """
    if tensor.numel() == 0:
        raise UserError(f"{operation}: {name} has shape {tuple(tensor.shape)}, and must not be empty")


def require_bool(operation: str, name: str, tensor: Tensor | None) -> None:
    """Refuse a mask that is not boolean.

    Raises:
        UserError: names the operation, the argument and its dtype.
    """
    if tensor is not None and tensor.dtype != torch.bool:
        raise UserError(f"{operation}: {name} is {tensor.dtype}, and must be torch.bool")
