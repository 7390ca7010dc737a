"""Checkpoint formats: one table a format says whose view each of its tensors is, and serves both ways."""

from moe_mamba.errors import UserError, brief
from moe_mamba.hf.formats.base import Entry, Format, WayOut
from moe_mamba.hf.formats.jamba import Jamba
from moe_mamba.hf.formats.llama import Llama
from moe_mamba.hf.formats.mamba import Mamba
from moe_mamba.hf.formats.mistral import Mistral
from moe_mamba.hf.formats.mixtral import Mixtral
from moe_mamba.hf.formats.own import Own
from moe_mamba.hf.formats.settings import Configuration
from moe_mamba.hf.formats.state_spaces import StateSpaces

__all__ = ["FORMATS", "NATIVE", "OWN", "Entry", "Format", "WayOut", "detect"]

OWN: WayOut = Own()
NATIVE: dict[str, WayOut] = {format.name: format for format in (Mamba(), Llama(), Mistral(), Mixtral(), Jamba())}
FORMATS: dict[str, Format] = {OWN.name: OWN, **NATIVE, "state_spaces": StateSpaces()}


def detect(configuration: Configuration) -> Format:
    """The format whose config.json this is.

    Raises:
        UserError: none of them.
    """
    kind = configuration.get("model_type")
    if kind is None and {"d_model", "n_layer", "ssm_cfg"} <= configuration.keys():
        return FORMATS["state_spaces"]
    if isinstance(kind, str) and kind in (OWN.name, *NATIVE):
        return FORMATS[kind]
    raise UserError(
        f"config.json: model_type={brief(kind)!r} is not supported: give a model of one of {', '.join(FORMATS)}"
    )
