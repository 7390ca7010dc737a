"""Configurations read from YAML and command lines, written, explained, and compared on a resume."""

import difflib
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config import Config
from moe_mamba.config_types import Section, allowed
from moe_mamba.config_yaml import read_yaml
from moe_mamba.errors import UserError, shown
from moe_mamba.installation import find_config

MOVED = {"model.kernels": "run.kernels"}
"""Keys of older versions -> what they are called now."""
LONGEST_KEY = 80  # of those for which a similar one is looked for, which takes long for long ones
SECTIONS = (("moe", "inner"),)
"""Sections inside sections."""


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration from YAML and from dotted overrides, which win.

    Args:
        path: YAML file, or the name of one that we ship, such as ``configs/demo.yaml``; None: every key at its default.
        overrides: dotted key, such as ``model.d_model``, -> value (text is read as the key's type).

    Raises:
        UserError: a file, key or value is wrong; the line names it and the fix.
    """
    tree = _read_yaml(find_config(Path(path))) if path is not None else {}
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        if not sections:
            raise UserError(f"unknown key {key}: keys are written --section.key=value{_nearest(key)}")
        place = tree
        for section in sections:
            if not isinstance(inner := place.get(section) or {}, Mapping):
                raise UserError(f"unknown key {key}{_nearest(key)}")
            place[section] = {**inner}
            place = place[section]
        place[name] = value
    for outer, name in SECTIONS:
        values = tree.get(outer)
        if isinstance(values, Mapping) and values.get(name, {}) is None:  # left empty in YAML
            tree[outer] = {**values, name: {}}
    config = parse_config({section: values or {} for section, values in tree.items()})
    for old, new in MOVED.items():
        section, _, name = old.partition(".")
        if name in (tree.get(section) or {}):
            print(f"{old} is now called {new} and is read as such", file=sys.stderr)
    return config


def parse_config(tree: Mapping[str, Any]) -> Config:
    """The configuration that `tree`, section -> key -> value, describes.

    Raises:
        UserError: a key or value is wrong; the line names it and the fix.
    """
    try:
        config = Config.model_validate(_moved(tree))
        # Not before: what is wrong with a number is said without the seconds that torch takes to load.
        from moe_mamba.model.pattern import check_pattern

        check_pattern(config.model, config.moe)
        _check_experts(config)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def _check_experts(config: Config) -> None:
    """Refuse a layout for experts where there are none, or one that cannot hold them."""
    from moe_mamba.model.pattern import has_experts

    parallel, pattern, projections = config.parallel, config.model.pattern, config.moe.inner.projections
    inside = f" and moe.inner.projections={','.join(projections)}" if projections else ""
    if parallel.zero == 3 and has_experts(config.model, config.moe):
        raise ValueError(
            f"parallel.zero=3 with model.pattern={pattern}{inside}: DeepSpeed cannot shard the weights of experts by "
            "ZeRO-3: set parallel.zero=2, and parallel.expert to spread the experts"
        )
    if parallel.expert > 1 and not has_experts(config.model, config.moe):
        raise ValueError(
            f"parallel.expert={parallel.expert} with model.pattern={pattern}, which has no experts: "
            "set parallel.expert=1"
        )


def _moved(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with keys of older versions under their names of today."""
    moved = dict(tree)
    for old, new in MOVED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        values = moved.get(section)
        there = moved.get(new_section) or {}
        if not isinstance(values, Mapping) or name not in values or not isinstance(there, Mapping):
            continue
        there = dict(there)
        if there.setdefault(new_name, values[name]) != values[name]:
            raise UserError(
                f"{old}={values[name]} and {new}={there[new_name]}: {old} is now called {new}: give only the new key"
            )
        moved[section] = {key: value for key, value in values.items() if key != name}
        moved[new_section] = there
    return moved


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, whole or not at all; :func:`load_config` of the file gives an equal one."""
    write_atomically(path, yaml.safe_dump(config.model_dump(), sort_keys=False))


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key as (dotted name, default as text, meaning)."""
    for name, key in section.model_fields.items():
        if isinstance(key.annotation, type) and issubclass(key.annotation, Section):
            yield from keys(key.annotation, f"{prefix}{name}.")
        else:
            default = key.default if isinstance(key.default, str) else json.dumps(key.default)
            yield f"{prefix}{name}", default, f"{key.description}{_choices(key.annotation)}"


def reference() -> str:
    """The text that ``--help`` prints: every key with its default, unit and meaning."""
    rows = list(keys())
    width = max(len(f"--{name}={default}") for name, default, _ in rows if len(default) < 24)
    return "\n".join(f"  {f'--{name}={default}':<{width}}  {meaning}" for name, default, meaning in rows)


def changed_on_resume(saved: Config, asked: Config) -> list[tuple[str, Any, Any]]:
    """Keys that a resumed run may not change, but that differ: as :func:`changed`."""
    free = {"train", "parallel", "checkpoint", "logging"}
    fixed_in_free = {"train.global_batch", "train.precision", "train.warm_start"}
    free_in_fixed = {"run.folder", "run.kernels", "data.cache", "data.verify"}
    return [
        (key, *values)
        for key, *values in changed(saved, asked)
        if key in fixed_in_free or (key.partition(".")[0] not in free and key not in free_in_fixed)
    ]


def changed(saved: Config, asked: Config) -> list[tuple[str, Any, Any]]:
    """Keys that differ: (dotted name, saved value, asked value).

    A ``model.vocab_size`` of null asks for the saved one.
    """
    asked = asked if asked.has_vocabulary else asked.with_vocabulary(saved.model.vocab_size)
    before, after = (dict(_flat(config)) for config in (saved, asked))
    return [(key, before[key], after[key]) for key in before if before[key] != after[key]]


def _flat(config: Config) -> Iterator[tuple[str, Any]]:
    """Every key and its value, in the order of ``keys``."""
    for key, _, _ in keys():
        yield key, functools.reduce(getattr, key.split("."), config)


def _read_yaml(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(values, dict | None) for values in tree.values()):
        raise UserError(
            f"config file {path}: the top level must be a mapping of sections: {', '.join(Config.model_fields)}"
        )
    return tree


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        key = ".".join(map(str, first["loc"]))
        return f"unknown key {key}{_nearest(key)}"
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    value = f"{key}={shown(first['input'])}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{value}: it is a section, with keys of its own; --help lists them"
    meaning = _meanings().get(key)
    return f"{value}: {allowed(first)}{f' ({meaning})' if meaning else ''}"


@functools.cache
def _meanings() -> dict[str, str]:
    return {name: meaning for name, _, meaning in keys()}


def _nearest(key: str) -> str:
    if len(key) > LONGEST_KEY:
        return ": --help lists the keys"
    known = list(_meanings())
    by_last_part = {name.partition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, 1, 0.7) or [
        by_last_part[part] for part in difflib.get_close_matches(key.rpartition(".")[2], by_last_part, 1, 0.7)
    ]
    return f": did you mean {near[0]}?" if near else ": --help lists the keys"


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f" [{' | '.join(str(choice) for choice in get_args(annotation))}]"
    return ""
