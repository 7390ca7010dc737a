"""What would break the real run breaks the rehearsal, in one line that says where."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_mamba.errors import RunStopped, UserError
from moe_mamba.model.mixers import attention, mamba
from moe_mamba.parallel import parallelize, placement
from moe_mamba.parallel.topology import Topology
from moe_mamba.rehearsal import step
from tests.parallel.layouts import Layout, config_of
from tests.rehearsal.process import Rehearsals


def with_fault(owner: str, name: str, change: Callable[[Any], Any], pattern: str, layout: Layout, **keys: Any) -> None:
    """In the process: rehearse with another function in the place of one."""
    config = config_of(pattern, layout, train__precision="bf16", **keys)
    module = import_module(owner)
    with mock.patch.object(module, name, change(getattr(module, name))):
        step.rehearse(config, layout.ranks, 1)


def unchecked(_: Any) -> Any:
    return Topology.of


def unpadded(_: Any) -> Any:
    return lambda spec, width, size: width // size * size


def all_in_bf16(_: Any) -> Any:
    def cast(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    return cast


def one_on_the_host(fill: Any) -> Any:
    def fill_and_leave(*arguments: Any) -> Any:
        model = fill(*arguments)
        weight = model.final_norm.weight
        model.final_norm.weight = torch.nn.Parameter(weight.detach().to("cpu"))
        return model

    return fill_and_leave


def frequencies_on_the_host(make: Any) -> Any:
    return lambda config, dtype, device: make(config, dtype, torch.device("cpu"))


def a_of_the_scan(change: Callable[[Tensor], Tensor]) -> Any:
    def wrap(scan: Any) -> Any:
        return lambda x, delta, A, *others: scan(x, delta, change(A), *others)

    return wrap


def in_bf16(scan: Any) -> Any:
    return a_of_the_scan(lambda A: A.bfloat16())(scan)


def on_the_host(scan: Any) -> Any:
    return a_of_the_scan(lambda A: A.cpu())(scan)


def tensor_group_of_all(start: Any) -> Any:
    return lambda plan: replace(start(plan), tensor=dist.group.WORLD)


@pytest.mark.parametrize(
    ("owner", "name", "change", "pattern", "layout", "keys", "said"),
    [
        pytest.param(
            *(step, "check", unchecked, "E", Layout(4, 1, 4), {"moe__experts": 6}),
            "4 ranks hold 4 of the 6 elements",
            id="experts that do not divide",
        ),
        pytest.param(
            *(placement, "padded_width", unpadded, "M", Layout(2, 2), {}),
            "embedding.weight: 2 ranks hold 300 of the 301 elements",
            id="a vocabulary that is not padded",
        ),
        pytest.param(
            *(step, "start_groups", tensor_group_of_all, "M", Layout(4, 2), {}),
            "the tensor group has ranks 0-3, and must have ranks 0-1",
            id="a group of the wrong size",
        ),
        pytest.param(
            *(step, "fill_model", one_on_the_host, "-", Layout(2), {}),
            "final_norm.weight lies on cpu, and must lie on gpu:0",
            id="a weight on the host",
        ),
        pytest.param(
            *(attention, "rotary_frequencies", frequencies_on_the_host, "*", Layout(2), {}),
            "in its forward: Expected all tensors to be on the same device",
            id="a tensor on the host",
        ),
        pytest.param(
            *(mamba, "selective_scan", on_the_host, "M", Layout(2), {}),
            "selective_scan: A is on cpu, and must be on gpu:0",
            id="a tensor on the host for a kernel",
        ),
        pytest.param(
            *(parallelize, "cast_to_bf16", all_in_bf16, "M", Layout(2), {}),
            "torch.bfloat16, and is promised in fp32",
            id="weights that stay fp32 in bf16",
        ),
        pytest.param(
            *(mamba, "selective_scan", in_bf16, "M", Layout(2), {}),
            "selective_scan_triton is given A in torch.bfloat16, which is promised in fp32",
            id="an operand in bf16",
        ),
    ],
)
def test_planted_faults_are_caught(
    rehearsals: Rehearsals,
    owner: Any,
    name: str,
    change: Callable[[Any], Any],
    pattern: str,
    layout: Layout,
    keys: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(RunStopped) as stop:
        rehearsals.run(with_fault, owner.__name__, name, change, pattern, layout, **keys)
    assert str(stop.value).startswith("rank 1 of ")
    assert said in str(stop.value)


def test_what_a_start_refuses_is_refused(rehearsals: Rehearsals) -> None:
    with pytest.raises(UserError, match=r"parallel\.expert=4 does not divide moe.experts=6"):
        rehearsals.run(step.rehearse, config_of("E", Layout(4, 1, 4), moe__experts=6), 4, 1)
    with pytest.raises(UserError, match="--rank=4: 4 GPUs have ranks from 0 to 3"):
        rehearsals.run(step.rehearse, config_of("-", Layout(4)), 4, 4)
    with pytest.raises(UserError, match="--gpu=h1 is not known"):
        rehearsals.run(step.rehearse, config_of("-", Layout(4)), 4, 3, gpu="h1")
