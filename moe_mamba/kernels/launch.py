"""What launches of kernels share. It imports no Triton, so that every module may use it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moe_mamba.kernels.stand_in import stand_in_for


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one, where Triton launches; does nothing for a tensor on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(tensor: Tensor) -> int | None:
    """How many the tensor's GPU has; None: it lies on no GPU."""
    if stand_in := stand_in_for(tensor.device.type):
        return stand_in.multiprocessors
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else None


def ceil_divide(total: int, part: int) -> int:
    """How many parts cover the total: the programs along one axis of a grid."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number`` (and at least 1): a block's size must be one."""
    return 1 << (max(number, 1) - 1).bit_length()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense in memory, else a contiguous copy of it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is contiguous and of that dtype, else a copy that is; asking first is quicker."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
