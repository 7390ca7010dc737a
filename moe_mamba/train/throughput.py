"""How much of its devices a run makes use of: TFLOP/s and, where the peak of the GPU is known, MFU."""

from dataclasses import dataclass

import torch

from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.devices import TERA, peak_flops


@dataclass(frozen=True)
class Throughput:
    """What turns tokens per second into operations per second.

    Attributes:
        flops_per_token: of the model, forward and backward; see ``LanguageModel.flops_per_token``.
        devices: that share the work.
        peak: operations per second of one device in the dtype that is trained in; None: not known.
    """

    flops_per_token: int
    devices: int
    peak: float | None

    @classmethod
    def of(cls, plan: RunPlan) -> "Throughput":
        """Of a run on this process's kind of device."""
        config, world = plan.config, plan.topology.world
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        is_gpu = world.device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(world.device), dtype) if is_gpu else None
        return cls(plan.model.flops_per_token(config.data.sequence_length), world.size, peak)

    def figures(self, tokens_per_second: float) -> dict[str, float]:
        """What metrics and bar have of a speed: ``tokens_per_second`` of all devices, ``tflops`` and ``mfu`` of one.

        ``tflops`` are the model's operations per second, in units of 10^12: what is computed twice (recomputation)
        counts once, and empty slots of experts do not count. ``mfu``, their share of the peak, is left out where that
        is not known.
        """
        flops = self.flops_per_token * tokens_per_second / self.devices
        used = {"tflops": flops / TERA}
        if self.peak is not None:
            used["mfu"] = flops / self.peak
        figures = {name: float(f"{value:.4g}") for name, value in used.items()}
        return {"tokens_per_second": round(tokens_per_second, 1)} | figures
