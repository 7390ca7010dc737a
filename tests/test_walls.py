"""Who may import whom: the walls of the house, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_mamba"

# room: rooms of ours that it may import, beside itself and errors
ALLOWED = {
    "errors": set(),
    "config_types": set(),
    "config_model": {"config_types"},
    "config": {"config_model", "config_types"},
    "config_file": {"config"},
    "command_line": set(),
    "kernels": set(),
    "model": {"kernels", "config"},
    "data": {"config"},
    "parallel": {"model", "config"},
    "hf": {"model", "kernels", "config", "data"},
    "planning": {"parallel", "model", "config"},
    "train": {"parallel", "model", "kernels", "data", "planning", "hf", "config", "config_file"},
}
CONFIGURATION = ("config_types", "config_model", "config", "config_file")
# room: packages from outside, beside the standard library's, that it must not know
FOREIGN = {
    **{room: {"torch", "deepspeed", "megatron", "transformers", "datasets"} for room in CONFIGURATION},
    "kernels": {"deepspeed", "megatron", "transformers", "datasets", "torch.distributed"},
    "model": {"deepspeed", "megatron", "transformers", "datasets", "torch.distributed"},
    "data": {"deepspeed", "transformers"},
}
ASSEMBLED = "modeling_moe_mamba.py"


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if path.name == ASSEMBLED and node.level == 1:
                continue  # a folder of a model holds it beside its configuration
            assert node.level == 0, f"{path.name}: relative imports hide who imports whom"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_what_it_may(path: Path) -> None:
    room = _room(path)
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith("moe_mamba.")}
    assert ours <= ALLOWED[room] | {room, "errors"}
    for name in _imports(path):
        forbidden = {package for package in FOREIGN.get(room, ()) if f"{name}.".startswith(f"{package}.")}
        assert not forbidden, f"{room} must not import {forbidden}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_package_imports_no_command(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path)} & {"launch", "tools", "tests"}
