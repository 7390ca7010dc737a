"""Logical names of parameters and buffers: what checkpoints and initial weights know them by.

A logical name is the path of attributes that led to the tensor when its kind of module was first released. A module
whose attributes are called otherwise today says so: ``logical_names`` maps an attribute of its own (a parameter, a
buffer or a module) to its part of the name. So code can be renamed, and old checkpoints and seeds keep their meaning.
"""

from collections.abc import Iterator, Mapping

from torch import nn


def logical_names(model: nn.Module) -> dict[str, str]:
    """Path of attributes -> logical name, of every parameter and buffer of ``model``, in the order of its state."""
    return dict(_names(model, "", ""))


def _names(module: nn.Module, path: str, name: str) -> Iterator[tuple[str, str]]:
    declared: Mapping[str, str] = getattr(module, "logical_names", {})
    for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield path + own, name + declared.get(own, own)
    for child, inner in module.named_children():
        yield from _names(inner, f"{path}{child}.", f"{name}{declared.get(child, child)}.")
