"""The versions that pyproject.toml allows, constraints.txt pins and the tests try are the same story."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from moe_mamba.hf.versions import NEWEST
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDED = {"torch": 2, "deepspeed": 2, "megatron-core": 2, "transformers": 2, "lm-eval": 3}  # parts of the bound


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {_normal(name): Version(version) for name, version in pins}


def _wanted(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def _bounds(name: str) -> set[str]:
    """Upper bounds of a library, wherever it is wanted."""
    specifiers = [wanted.specifier for wanted in _wanted(*PROJECT["optional-dependencies"]) if wanted.name == name]
    return {bound.version for specifier in specifiers for bound in specifier if bound.operator == "<"}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = _pinned()
    for wanted in _wanted("test", "evaluation", "benchmark"):
        assert wanted.specifier.contains(pinned[_normal(wanted.name)]), wanted


def test_pins_have_no_local_label() -> None:
    assert len(_pinned()) > 50
    assert not [name for name, version in _pinned().items() if version.local]


def test_libraries_that_are_subclassed_are_bounded_behind_the_last_that_passed() -> None:
    pinned = _pinned()
    for name, parts in BOUNDED.items():
        (bound,) = _bounds(name)
        if name == "megatron-core":
            continue  # its newer versions need Python 3.12, and the pins are of 3.11
        last = list(pinned[name].release[:parts])
        assert list(Version(bound).release) == [*last[:-1], last[-1] + 1], name


def test_the_newest_transformers_that_is_tested_is_the_last_that_is_allowed() -> None:
    (bound,) = _bounds("transformers")
    major, minor = Version(bound).release
    assert f"{major}.{minor - 1}" == NEWEST


def test_the_classifiers_name_the_pythons_that_are_allowed() -> None:
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"]}
    assert named == {f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}")}
