"""How a model's parameters are sharded, for people: what its mixers declare, one kind of layer after the other."""

from collections.abc import Iterator

from torch import nn

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel, shard_specs
from moe_mamba.model.sharding import ShardSpec

HEAD = ("parameter", "shape", "sharded", "precision")


def shards_table(config: Config) -> str:
    """A row for each parameter of the model itself and of the first layer of each kind.

    Columns: name, shape, axes with their blocks and groups, and the precision under ``train.precision=bf16``.
    """
    model = LanguageModel.on_meta(config.model, config.moe)
    rows = [HEAD, *_rows(model, config)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rows(model: LanguageModel, config: Config) -> Iterator[tuple[str, ...]]:
    specs, fp32 = shard_specs(config.model, config.moe), model.fp32_parameter_names()
    for name, parameter in _of_each_kind(model):
        shape = " x ".join(f"{length:,}" for length in parameter.shape)
        sharded = "; ".join(map(_describe, specs.get(name, ()))) or "replicated"
        yield name, shape, sharded, "fp32" if name in fp32 else "bf16"


def _of_each_kind(model: LanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters outside the layers, and those of the first layer of each kind."""
    first: dict[tuple[type, ...], int] = {}
    for index, layer in enumerate(model.layers):
        first.setdefault(tuple(type(mixer) for mixer in layer.mixers), index)  # type: ignore[union-attr]
    shown = tuple(f"layers.{index}." for index in first.values())
    for name, parameter in model.named_parameters():
        if name.startswith(shown) or not name.startswith("layers."):
            yield name, parameter


def _describe(spec: ShardSpec) -> str:
    """``axis 0 over tensor: 1,024 + 1,024 by model.expand x model.d_model``, and what is special."""
    widths = " + ".join(f"{block.width:,}" for block in spec.blocks)
    text = f"axis {spec.axis} over {spec.group}: {widths} by {spec.key}"
    notes = {
        "padded": spec.is_padded,
        "replicated beyond them": spec.is_replicable,
        "sum used by every rank": spec.is_reduced,
    }
    return ", ".join([text, *(note for note, holds in notes.items() if holds)])
