"""Where the first bad value of a broken step comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mamba.data.batch import Batch
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import from_all


def first_bad_place(model: LanguageModel, batches: Sequence[Batch]) -> tuple[str, bool]:
    """Words for the first bad value that any rank has, and whether it is in a parameter; all ranks call it together.

    Args:
        model: as it is in the broken step.
        batches: micro-batches of that step; none: nothing is looked for.
    """
    places = from_all(first_bad_parameter(model) if batches else None)
    is_in_parameter = any(places)
    if not is_in_parameter:
        for batch in batches:
            places += from_all(first_bad_output(model, batch))
    return next((f"; the first bad value is in {place}" for place in places if place), ""), is_in_parameter


def first_bad_parameter(model: LanguageModel) -> str | None:
    """Name the first parameter of this rank that holds a NaN or infinity; or None."""
    parts = (
        (name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters()
    )  # ZeRO-3's
    bad = (name for name, part in parts if not part.isfinite().all())
    return next((f"the parameter {name}" for name in bad), None)


@torch.no_grad()
def first_bad_output(model: LanguageModel, batch: Batch) -> str | None:
    """Name the module whose output is the first to hold a NaN or infinity on a micro-batch; or None.

    All ranks call it together, since they may share layers.

    Args:
        model: the model, as it is in the broken step.
        batch: the micro-batch that gave the bad loss.
    """
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: _note(bad, name, output))
        for name, module in model.named_modules()
        if name
    ]
    model(batch.tokens, batch.document_starts, targets=batch.targets)
    for hook in hooks:
        hook.remove()
    return f"the output of {bad[0]}" if bad else None


def _note(bad: list[str], name: str, output: object) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return
    if (first.isnan() | first.isposinf()).any():  # minus infinity is the logit of padding
        bad.append(name)
