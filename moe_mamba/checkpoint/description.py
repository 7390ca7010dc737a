"""What a checkpoint says beside its tensors: the types of `description.json`, on which its readers rely.

A run writes all of these keys. Others write fewer (starting points, older versions), and may write more.
"""

from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from moe_mamba.json_file import Number, Record, Size, Text

Positive = Annotated[Size, Field(gt=0)]


class RecoveryRecord(Record):
    """What `train/recovery.py` goes on from."""

    position: Size = 0
    skipped_batches: list[Size] = Field([])
    without_targets: Size = 0
    bad: Size = 0
    furthest: Size = 0
    recent: list[Annotated[list[Number], Field(min_length=2, max_length=2)]] = Field([])


class StretchRecord(Record):
    """A stretch of the learning rate's curve (`train/schedule.py`)."""

    begin: Size
    start: Annotated[Number, Field(ge=0, le=1)]
    warm_end: Size
    end: Positive


class Description(Record):
    """The keys of a run."""

    step: Size | None = None
    tokens: Size | None = None
    config: dict[str, dict[str, Any]] = Field({})
    tokenizer: Text | None = None
    corpora: dict[str, Text] = Field({})
    processes: Positive | None = None
    micro_batch: Positive | None = None
    micro_steps: Positive | None = None
    validation_loss: Number | None = None
    recovery: RecoveryRecord = RecoveryRecord()
    rates: list[StretchRecord] = Field([])

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = self.recovery
        if self.step is not None and known.position not in (0, self.step + len(known.skipped_batches)):
            raise ValueError("recovery.position is not the number of steps and of batches that were left out")
        begins = [stretch.begin for stretch in self.rates]
        if begins and (begins[0] or any(one >= other for one, other in pairwise(begins))):
            raise ValueError("rates are not the stretches of a run, one after the other")
        if any(stretch.warm_end < stretch.begin for stretch in self.rates):
            raise ValueError("rates has a warm-up that ends before it begins")
        return self
