"""A mixer that only this file knows trains, is sharded, saved, resumed in another layout, and generates.

Nothing of the package has a line for it: what it declares is all that there is.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from launch.train import train
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.config_file import load_config
from moe_mamba.convert.to_hf import choose_format
from moe_mamba.errors import UserError
from moe_mamba.model.costs import enter, layer_peak, leave
from moe_mamba.model.generation import generate
from moe_mamba.model.initialize import Initializer, initialize, ones, uniform
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers import MIXERS
from moe_mamba.model.mixers.base import Mixer, State, Statistics
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import Rows, Share
from moe_mamba.planning.shards import shards_table
from moe_mamba.run.metrics import read_metrics
from moe_mamba.run.restore import restore
from tests.train.runs import curve
from tests.world import World


@dataclass(frozen=True)
class ShiftState(State):
    """The last input (batch, d_inner)."""

    last: Tensor


class TokenShift(Mixer):
    """Each channel adds a learned share of what it had one token before."""

    letter, title = "T", "token shift"
    fp32_names = ("share",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, config.resolved_d_inner, bias=False)
        self.share = nn.Parameter(torch.empty(config.resolved_d_inner))
        self.out_proj = nn.Linear(config.resolved_d_inner, config.d_model, bias=False)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "TokenShift":
        return cls(config)

    def initializers(self) -> dict[str, Initializer]:
        wide, narrow = uniform(self.config.resolved_d_inner), uniform(self.config.d_model)
        return {"in_proj.weight": narrow, "share": ones, "out_proj.weight": wide}

    def initial_state(self, batch: int, dtype: torch.dtype, device: Any, room: int | None = None) -> ShiftState:
        return ShiftState(torch.zeros(batch, self.config.resolved_d_inner, dtype=dtype, device=device))

    def forward(self, x: Tensor, sequences: Sequences, state: Any = None) -> tuple[Tensor, Statistics, Any]:
        u = self.in_proj(x).view(sequences.batch, sequences.length, -1)  # (batch, length, d_inner)
        first = torch.zeros_like(u[:, 0]) if state is None else state.last
        before = torch.cat((first[:, None], u[:, :-1]), dim=1)
        if sequences.document_starts is not None:
            before = before.masked_fill(sequences.document_starts[..., None], 0)
        y = torch.tanh(u + self.share.to(u.dtype) * before).flatten(0, 1)
        return self.out_proj(y), {}, None if state is None else ShiftState(u[:, -1])

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        def channels(axis: int) -> tuple[ShardSpec, ...]:
            return (
                ShardSpec(
                    axis, "tensor", (Block(config.resolved_d_inner, units=config.resolved_d_inner),), "model.d_inner"
                ),
            )

        return {"in_proj.weight": channels(0), "share": channels(0), "out_proj.weight": channels(1)}

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        tokens, channels = share.tokens, config.resolved_d_inner // share.tensor
        x = enter(tape, x, share, config.d_model, joins)
        u = tape.linear(x, tokens, config.d_model, channels)
        before = tape.one(u, numbers=tokens * channels)
        product = tape.one(before, numbers=tokens * channels, keeps=(before,))
        total = tape.add(u, product)
        y = tape.tensor(tokens * channels)
        tape.do((total,), (y,), keeps=(y,))
        return leave(tape, tape.linear(y, tokens, channels, config.d_model), share, config.d_model, joins)


KEYS = {
    "model.pattern": "TE",
    "moe.capacity_factor": None,
    "train.global_batch": 8,
    "train.micro_batch": 4,
    "train.sample_tokens": 4,
    "train.validate_every": 0,
    "checkpoint.every": 3,
}


@pytest.fixture
def registered() -> Iterator[None]:
    with mock.patch.dict(MIXERS, {TokenShift.letter: TokenShift}):
        yield


def train_with_it(**arguments: Any) -> None:
    """In a worker, which has its own registry."""
    with mock.patch.dict(MIXERS, {TokenShift.letter: TokenShift}):
        train(**arguments)


def test_an_unknown_letter_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.pattern=TE: unknown letter 'T': choose among M Mamba, "):
        load_config(None, {"model.pattern": "TE"})


def test_it_trains_resumes_in_another_layout_and_generates(
    world: World, tiny: Path, tmp_path: Path, registered: None
) -> None:
    def losses(folder: str, ranks: int, **layout: int) -> Tensor:
        keys = KEYS | {f"parallel.{key}": size for key, size in layout.items()}
        world.run(train_with_it, ranks=ranks, config=str(tiny), **{"run.folder": str(tmp_path / folder)}, **keys)
        return torch.tensor(curve(read_metrics(tmp_path / folder)))

    single = losses("single", 1)
    assert single[-1] < single[0]
    torch.testing.assert_close(losses("sharded", 2, tensor=2, expert=2), single, rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path / "single" / "checkpoints" / "step-00000006")
    torch.testing.assert_close(losses("single", 2, tensor=2), single, rtol=0, atol=1e-5)
    model = restore(tmp_path / "single", torch.device("cpu")).model
    text = list(generate(model, [1, 2, 3], 4, temperature=0))
    with torch.no_grad():
        for place in range(len(text)):
            logits = model(torch.tensor([[1, 2, 3, *text[:place]]])).logits
            assert int(logits[0, -1].argmax()) == text[place]


def test_everything_that_asks_about_layers_has_an_answer(registered: None) -> None:
    config = load_config(None, {"model.pattern": "TM", "model.repeat": 1, "model.d_model": 16})
    table = shards_table(config)
    assert "layers.0.mixer.share" in table and "model.d_inner" in table
    model = LanguageModel(config.model, config.moe)
    initialize(model, 0)
    assert "layers.0.mixer.share" in model.fp32_parameter_names()
    assert model.mixers()[0].flops_per_token(8) == 6 * 2 * 16 * 32
    share = Share(batch=2, length=8, width=4, rows_of=lambda *_: Rows(0, 0))
    found = layer_peak((TokenShift,), config.model, config.moe, [share], Tape(4), merged=True)
    stream, channels = 2 * 8 * 16 * 4, 2 * 8 * 32 * 4  # its input, two tensors of channels, the norm's scales
    assert found.kept == stream + 2 * channels + 2 * 8 * 4
    with pytest.raises(UserError, match=r"^model\.pattern=TM has the layer T of tests\.test_new_mixer.*assemble_hf"):
        choose_format("auto", config.model, config.moe)
