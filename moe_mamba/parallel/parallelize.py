"""Change a model for a layout, from outside: the model's own files never see a rank."""

import shutil

import torch

from moe_mamba.config import TrainConfig
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel


def parallelize(model: LanguageModel, config: TrainConfig) -> None:
    """Apply, in place and in this order: precision, recomputation, compilation."""
    if config.precision == "bf16":
        cast_to_bf16(model)
    model.recompute = config.recompute
    if config.compile:
        for layer in model.layers:
            layer.compile()


def check_compiler(config: TrainConfig) -> None:
    """Refuse what torch.compile cannot do here.

    Raises:
        UserError: compilation is asked for on a CPU, and there is no C++ compiler.
    """
    if config.compile and not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("train.compile=true needs a C++ compiler on a CPU: install g++, or set train.compile=false")


def cast_to_bf16(model: LanguageModel) -> None:
    """Make every parameter bf16 but those whose small steps bf16 would lose (A_log, D, dt_bias, norms, router)."""
    keep = model.fp32_parameter_names()
    for name, parameter in model.named_parameters():
        if name not in keep:
            parameter.data = parameter.data.to(torch.bfloat16)
