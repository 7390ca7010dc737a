"""Where the first bad value of a broken step comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mamba.data.batch import Batch
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import from_all


def first_bad_place(model: LanguageModel, batches: Sequence[Batch]) -> tuple[str, bool]:
    """Words for the first bad value that any rank has, and whether it came from memory; all ranks call it together.

    From memory it came where a parameter holds it, which what is saved does not; or where the passes are right now: the
    step that was refused has gathered the weights anew from the optimizer's.

    Args:
        model: as it is after the broken step.
        batches: micro-batches of that step; none: nothing is looked for.
    """
    if not batches:
        return "", False
    if parameter := next(filter(None, from_all(first_bad_parameter(model))), None):
        return f"; the first bad value is in {parameter}", True
    for batch in batches:
        if output := next(filter(None, from_all(first_bad_output(model, batch))), None):
            return f"; the first bad value is in {output}", False
    return "; made again, the pass is right: a weight was spoilt in memory", True


def first_bad_parameter(model: LanguageModel) -> str | None:
    """Name the first parameter of this rank that holds a NaN or infinity; or None."""
    parts = (
        (name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters()
    )  # ZeRO-3's
    bad = (name for name, part in parts if not part.isfinite().all())
    return next((f"the parameter {name}" for name in bad), None)


@torch.no_grad()
def first_bad_output(model: LanguageModel, batch: Batch) -> str | None:
    """Name the module whose output is the first to hold a NaN or infinity on a micro-batch, or the loss; or None.

    All ranks call it together, since they may share layers.

    Args:
        model: the model, as it is after the broken step.
        batch: the micro-batch that gave the bad loss.
    """
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: _note(bad, name, output))
        for name, module in model.named_modules()
        if name
    ]
    loss = model(batch.tokens, batch.document_starts, targets=batch.targets).cross_entropy
    for hook in hooks:
        hook.remove()
    if bad:
        return f"the output of {bad[0]}"
    return None if loss.isfinite() else "the loss"


def _note(bad: list[str], name: str, output: object) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return
    if (first.isnan() | first.isposinf()).any():  # minus infinity is the logit of padding
        bad.append(name)
