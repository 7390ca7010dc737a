"""The benchmark's rows ``gpu_step`` and ``gpu_profile``: a training step of the paper's MoE-Mamba 25M in bf16."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_clock import gpu_row, rates
from benchmarks.gpu_moe import deepspeed_moe, one_process
from benchmarks.pairs import Row, Run, peer
from benchmarks.profiling import Profile, profile
from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import balance_loss

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "paper" / "moe_mamba_25m.yaml"
DTYPE = torch.bfloat16
PROFILED_STEPS = 3
TINY = {"model.repeat": 1, "model.d_model": 32, "model.vocab_size": 64, "moe.experts": 4, "moe.d_expert": 32}


@dataclass(frozen=True)
class StepShapes:
    """Sequences, and their length, that a step works on at once."""

    batch: int = 16
    length: int = 1024

    @staticmethod
    def choose(tiny: bool) -> "StepShapes":
        """What docs/measurements.md reports, or a tiny step."""
        return StepShapes(2, 16) if tiny else StepShapes()


def step_rows(device: torch.device, tiny: bool, repeats: int) -> list[Row]:
    """Forward, backward and AdamW, against the same model of mamba-ssm's blocks and DeepSpeed's experts."""
    shapes, config = StepShapes.choose(tiny), _config(tiny)
    tokens = torch.randint(config.model.vocab_size, (shapes.batch, shapes.length), device=device)
    model = our_model(config, device)
    operations = model.flops_per_token(shapes.length) * tokens.numel()
    floor = rates(device).floor(0, operations, in_bf16=True)

    def their_step() -> Run:
        theirs = Glued(config).to(device, DTYPE)
        return training_step(theirs, lambda: theirs.loss(tokens))

    name = f"training step, MoE-Mamba 25M, bf16, {shapes.batch} x {shapes.length:,} tokens"
    against = "mamba-ssm's blocks and DeepSpeed's MoE"
    ours = training_step(model, lambda: our_loss(model, config, tokens))
    with one_process():
        return [gpu_row(name, against, ours, their_step, repeats, 1.3, device, floor)]


def step_profile(device: torch.device, tiny: bool, repeats: int) -> list[Profile]:
    """Where the time of our step goes, by operation and by kernel."""
    shapes, config = StepShapes.choose(tiny), _config(tiny)
    tokens = torch.randint(config.model.vocab_size, (shapes.batch, shapes.length), device=device)
    model = our_model(config, device)
    step = training_step(model, lambda: our_loss(model, config, tokens))
    name = f"training step, MoE-Mamba 25M, bf16, {shapes.batch} x {shapes.length:,} tokens"
    return [profile(name, model, step, PROFILED_STEPS)]


def _config(tiny: bool) -> Config:
    return load_config(CONFIG, TINY if tiny else {})


def our_model(config: Config, device: torch.device) -> LanguageModel:
    """Our model in bf16 but for its fp32 list, as one device trains it."""
    with torch.device(device):
        model = LanguageModel(config.model, config.moe)
    initialize(model, seed=0)
    wide = model.fp32_parameter_names()
    for name, parameter in model.named_parameters():
        if name not in wide:
            parameter.data = parameter.data.to(DTYPE)
    return model


def our_loss(model: LanguageModel, config: Config, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens, and the balance loss."""
    output = model(tokens, targets=tokens.roll(-1, 1))
    balance = torch.stack([balance_loss(layer) for layer in output.statistics.values()]).mean()
    return output.cross_entropy / tokens.numel() + config.moe.balance_weight * balance


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """What one step does, the same for both: the loss, its gradients, AdamW."""
    on_gpu = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu or None)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Glued(nn.Module):
    """The same model as one would glue it: mamba-ssm's ``Mamba`` and DeepSpeed's ``MoE`` in a residual stack."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        Mamba = peer("mamba_ssm.modules.mamba_simple", "Mamba", "mamba-ssm", "cuda")
        model, moe = config.model, config.moe
        assert moe.d_expert is not None
        self.balance_weight = moe.balance_weight
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        layers: list[nn.Module] = []
        for _ in range(model.repeat):
            layers += [Mamba(model.d_model), deepspeed_moe(model.d_model, moe.d_expert, moe.experts)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(model.d_model) for _ in layers)
        self.final_norm = nn.LayerNorm(model.d_model)
        self.head = nn.Linear(model.d_model, model.vocab_size, bias=False)

    def loss(self, tokens: Tensor) -> Tensor:
        """As ``our_loss``; tokens (batch, length)."""
        stream = self.embedding(tokens)  # (batch, length, d_model)
        balances = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            update = layer(norm(stream))
            if isinstance(update, tuple):
                update, balance, _ = update
                balances.append(balance)
            stream = stream + update
        logits = self.head(self.final_norm(stream)).float()
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
        return cross_entropy + self.balance_weight * torch.stack(balances).mean()
