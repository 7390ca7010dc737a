"""The README tells the truth: its files exist, its keys and flags are known, its commands are the CI's."""

import inspect
import re
import runpy

import pytest

from moe_mamba.config_file import keys
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG_KEYS = {name for name, _, _ in keys()}
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def test_every_key_that_it_names_exists() -> None:
    sections = "|".join(sorted({name.split(".")[0] for name in CONFIG_KEYS}))
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`", README))
    named |= set(re.findall(rf"--((?:{sections})\.[a-z_0-9]+)", README))
    named -= {name for name in named if (ROOT / "moe_mamba" / name.replace(".", "/")).exists() or name.endswith(".py")}
    assert len(named) > 10
    assert named <= CONFIG_KEYS


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"(?:configs|tools|launch|docs)/[\w{},*/.-]+\.(?:yaml|py|md|png)", README)
    assert len(named) > 10
    for name in named:
        for path in _expanded(name):
            assert list(ROOT.glob(path)), path


def _expanded(name: str) -> list[str]:
    """a/{b,c}.yaml -> a/b.yaml, a/c.yaml."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    middle, _, tail = rest.partition("}")
    return [f"{head}{choice}{tail}" for choice in middle.split(",")]


def test_the_tree_names_every_room() -> None:
    for path in (ROOT / "moe_mamba").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"  {path.name}" in README, path
        elif path.is_dir() and path.name != "__pycache__":
            assert f"  {path.name}/" in README, path


@pytest.mark.parametrize("tool", TOOLS)
def test_it_shows_every_tool_with_flags_that_exist(tool: str) -> None:
    commands = re.findall(rf"tools/{re.escape(tool)} ([^`\n]*)", README)
    assert commands, f"the README does not show tools/{tool}"
    module = runpy.run_path(str(ROOT / "tools" / tool))
    known = inspect.signature(module["main"]).parameters
    for command in commands:
        flags = set(re.findall(r"--([a-z_]+)", command))
        assert flags <= known.keys(), command
