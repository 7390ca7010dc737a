"""ZeRO-3: each rank keeps a part of every weight, and a module's whole weights exist only while it computes.

DeepSpeed gathers a module's own parameters before its forward and backward, and frees them after. What this file adds:
weights are filled and sharded one module at a time; parameters that are read outside their owner's forward are made
known to the module that reads them; no graph keeps a gathered weight alive from the forward to the backward pass.

DeepSpeed cannot mix dtypes here, so with ``train.precision=bf16`` every parameter is kept in fp32, as masters are at
other stages, and travels as bf16, save those of the fp32 list. The stream is bf16, and a matrix is cast to the
stream's dtype where it is used: the same function as at the other stages. (Under ``torch.autocast`` every rank would
hold a bf16 copy of all weights, in its cache and in the graph; and the scan's products would be cast as well.)
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import deepspeed.runtime.zero.utils
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import buckets
from moe_mamba.parallel.groups import Groups
from moe_mamba.parallel.initialize import fill
from moe_mamba.parallel.run_plan import RunPlan


def settings() -> dict[str, Any]:
    """What DeepSpeed's configuration says about this stage."""
    return {
        "stage3_param_persistence_threshold": buckets.PERSISTENT,
        "stage3_max_live_parameters": buckets.LIVE,
        "stage3_max_reuse_distance": buckets.LIVE,
    }


def partition_model(model: LanguageModel, plan: RunPlan, groups: Groups) -> None:
    """Fill a model on the meta device and shard it over the data ranks, in place, one module after the other.

    A rank never holds more than its parts, and one module's own weights while they are sharded.

    Args:
        model: sharded among tensor-parallel ranks already, if there are any.
        plan: of the run.
        groups: of its layout.
    """
    _quieten()
    in_bf16 = plan.config.train.precision == "bf16"
    fp32_names = model.fp32_parameter_names()
    _replace_products(model)
    for prefix, module in reversed(list(model.named_modules())):  # children first: DeepSpeed converts what is below
        module.to_empty(device=groups.topology.world.device, recurse=False)
        own = dict(module.named_parameters(prefix, recurse=False))
        tensors = own | dict(module.named_buffers(prefix, recurse=False))
        fill(tensors, plan.model, plan.shards, plan.config.run.seed)
        for name, parameter in own.items():
            if in_bf16 and name not in fp32_names:
                parameter.comm_dtype = torch.bfloat16  # type: ignore[attr-defined]
        deepspeed.zero.Init(
            module=module, data_parallel_group=groups.data, dtype=torch.float32, mem_efficient_linear=False
        )
    _give_the_head_modules(model)
    if in_bf16:
        model.embedding.register_forward_hook(_to_bf16)


def _quieten() -> None:
    """Leave out what DeepSpeed would warn of at every stage-3 run."""
    # It cannot see into our Output, where nothing is to be gathered or freed.
    deepspeed.runtime.zero.utils.warned = True
    # It calls torch's collectives by names that newer versions of torch write otherwise.
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)


def _to_bf16(_: nn.Module, __: tuple[Any, ...], stream: Tensor) -> Tensor:
    return stream.bfloat16()


class _Product(torch.autograd.Function):
    """x W^T + b that keeps the parameter itself for the backward pass: DeepSpeed frees and gathers what it holds.

    Torch's own product keeps a view, and with it the gathered memory of every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors  # (..., in), (out, in)
        x_gradient = gradient @ weight.to(gradient.dtype)
        rows = gradient.flatten(0, -2)  # (tokens, out)
        weight_gradient = rows.t() @ x.flatten(0, -2)
        bias_gradient = None if ctx.bias_dtype is None else rows.sum(0, dtype=ctx.bias_dtype)
        return x_gradient, weight_gradient.to(weight.dtype), bias_gradient


class GatheredLinear(nn.Linear):
    """A linear map whose weight and bias are whole only while it computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out), in the dtype of ``x``."""
        return _Product.apply(x, self.weight, self.bias)


class Head(nn.Module):
    """The end of a model as a module of its own, so that the vocabulary's weight is gathered there and nowhere else.

    Args:
        compute: a method of the model's.
        weight: what it reads.
    """

    def __init__(self, compute: Callable[..., Any], weight: nn.Parameter) -> None:
        super().__init__()
        self._compute = compute
        deepspeed.zero.register_external_parameter(self, weight)

    def forward(self, *arguments: Tensor) -> Any:
        """What the method makes of a stream (tokens, d_model) and what else it takes."""
        return self._compute(*arguments)


def _replace_products(model: LanguageModel) -> None:
    """Let every linear map keep its parameter for the backward pass, those of tensor parallelism too."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            has_bias = module.bias is not None
            model.set_submodule(
                name, GatheredLinear(module.in_features, module.out_features, bias=has_bias, device="meta")
            )
        elif hasattr(module, "product"):  # Linear, tensor.RowLinear
            module.product = _Product.apply
    project = model.project
    assert isinstance(project, partial)
    # Of tensor parallelism, or the model's own.
    model.project = partial(project, product=_Product.apply) if "product" in project.keywords else _Product.apply


def _give_the_head_modules(model: LanguageModel) -> None:
    """Make known where the vocabulary's weight is read, which is not in its owner's forward."""
    (weight,) = (model.embedding if model.head is None else model.head).parameters()
    for name in ("logits", "losses"):
        head = Head(getattr(model, name), weight)
        model.add_module(f"output_{name}", head)
        setattr(model, name, head.__call__)


def gathered_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter while it is whole: at this stage it has no elements otherwise."""
    return getattr(parameter, "ds_shape", parameter.shape)


def masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The flat fp32 weights that AdamW steps, one for each sub-group of DeepSpeed's."""
    return engine.optimizer.fp32_partitioned_groups_flat


def owned_range(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """Where this rank's part of a parameter lies: rank r has elements r n to (r + 1) n, the last rank's are padded.

    Returns:
        The flat master, the first element in it, how many, and the first element in the flat parameter; padding is
        left out, so there may be none.
    """
    group, offset, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    start = length * parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
    count = max(0, min(length, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return masters(engine)[group], offset, count, start


def refresh(engine: deepspeed.DeepSpeedEngine) -> None:
    """Set the running parts of weights from the masters, and gather anew what stays gathered."""
    optimizer = engine.optimizer
    optimizer.parameter_offload.partition_all_parameters()
    for group in range(len(masters(engine))):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
