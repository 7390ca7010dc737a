"""Every model of a folder under Transformers' tensor parallelism, run by torchrun: ``sharded_script.py FOLDER``.

On each rank logits, greedy texts, losses, gradients and what is saved are those of the model on one device.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

TOKENS = torch.arange(2 * 9).view(2, 9)


def whole(tensor: Any) -> Tensor:
    """The tensor of all ranks' shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(folder: Path) -> None:
    """Fail unless the sharded model does what the whole one does."""
    expected = MoEMambaForCausalLM.from_pretrained(folder).eval()
    found = MoEMambaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    assert any(isinstance(parameter, DTensor) for parameter in found.model.layers.parameters())
    inside = [weight for name, weight in found.named_parameters() if "_experts." in name]
    assert len(inside) == 6 * (folder.name == "inner")
    assert not any(isinstance(weight, DTensor) for weight in inside)
    ways = ("eager", "batched_mm", "grouped_mm") if "E" in found.config.pattern else ("eager",)
    for way in ways:
        found.set_experts_implementation(way)
        with torch.no_grad():
            torch.testing.assert_close(found(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-5)
            if not found.model.looks_ahead:
                texts = (model.generate(TOKENS, max_new_tokens=6, do_sample=False) for model in (found, expected))
                assert torch.equal(*texts)
        losses = []
        for model in (found, expected):
            model.train().zero_grad()
            losses.append(model(TOKENS, labels=TOKENS, output_router_logits=found.model.has_experts).loss)
            losses[-1].backward()
            model.eval()
        torch.testing.assert_close(*losses)
        for name, parameter in expected.named_parameters():
            gradient = whole(found.get_parameter(name).grad)
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=f"{folder.name} {name}")
    saved = folder.with_name(f"{folder.name}-saved")
    found.save_pretrained(saved)
    torch.distributed.barrier()
    again = MoEMambaForCausalLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.state_dict().items())


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).iterdir()):
        check(path)
        sys.stdout.write(f"{path.name}\n")  # at once, which print is not: two ranks share the screen
        sys.stdout.flush()
