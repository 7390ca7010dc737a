"""Who may import whom, read off the source."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests import ROOT

PACKAGE = ROOT / "moe_mamba"

# room: rooms of ours that it may import, beside itself and errors; each stands above all that it imports
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "atomic_file": set(),
    "file_lock": set(),
    "lean_import": set(),
    "json_file": set(),
    "output_file": {"atomic_file"},
    "safetensors_header": {"json_file"},
    "config_types": set(),
    "config_yaml": set(),
    "config_model": {"config_types"},
    "config": {"config_model", "config_types"},
    "installation": set(),
    "config_file": {"atomic_file", "model", "config", "config_types", "config_yaml", "installation"},
    "standard_streams": set(),
    "command_line": {"parallel", "config_types", "standard_streams"},
    "kernels": {"atomic_file", "file_lock"},
    "checkpoint": {"atomic_file", "json_file", "safetensors_header"},
    "data": {"atomic_file", "file_lock", "lean_import"},
    "model": {"kernels", "config"},
    "hf": {"json_file", "safetensors_header", "model", "kernels", "config", "data"},
    "parallel": {"lean_import", "checkpoint", "model", "config"},
    "planning": {"run", "parallel", "model", "kernels", "config", "config_types"},
    "preflight": {
        *("run", "planning", "parallel", "model", "kernels", "data", "atomic_file", "json_file"),
        *("config", "installation"),
    },
    "run": {
        *("atomic_file", "file_lock", "parallel", "checkpoint", "model", "data"),
        *("config", "config_file", "installation"),
    },
    "convert": {
        *("safetensors_header", "hf", "run", "checkpoint", "model", "data"),
        *("config", "config_file", "installation"),
    },
    "evaluation": {"parallel", "run", "model", "kernels", "data", "config"},
    "faults": {"parallel", "run", "config"},
    "train": {
        *("evaluation", "faults", "preflight", "planning", "run", "checkpoint", "parallel"),
        *("model", "kernels", "data", "config", "config_file", "installation"),
    },
    "reproduce": {
        *("planning", "run", "model", "data", "config", "config_file", "config_types", "config_yaml"),
        *("installation", "atomic_file", "file_lock", "json_file"),
    },
    "rehearsal": {
        *("train", "faults", "preflight", "planning", "run", "checkpoint", "parallel"),
        *("model", "kernels", "data", "config", "safetensors_header"),
    },
    "commands": {
        *("reproduce", "rehearsal", "train", "faults", "preflight", "evaluation", "convert", "planning", "run"),
        *("checkpoint", "parallel", "model", "data", "config", "config_types", "config_file", "command_line"),
        *("installation", "atomic_file", "output_file"),
    },
    "__main__": {"command_line"},
}
CONFIGURATION = ("config_types", "config_yaml", "config_model", "config", "config_file")
# room: packages from outside, beside the standard library's, that it must not know
FOREIGN = {
    **{room: {"torch", "deepspeed", "megatron", "transformers", "datasets"} for room in CONFIGURATION},
    "kernels": {"deepspeed", "megatron", "transformers", "datasets", "torch.distributed"},
    "model": {"deepspeed", "megatron", "transformers", "datasets", "torch.distributed"},
    "checkpoint": {"deepspeed", "megatron", "transformers", "datasets"},
    "data": {"deepspeed", "transformers"},
    "hf": {"deepspeed", "megatron", "torch.distributed"},
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


def _modules() -> dict[str, set[str]]:
    """Each module of the package, by its dotted name, and the full names that it imports."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): _imports(path) for path in paths}


def test_rooms_import_downward_only() -> None:
    TopologicalSorter(ALLOWED).prepare()  # raises where two rooms are each above the other
    wrong, used = [], set()
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        room, names = _room(path), _imports(path)
        for name in names:
            root, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if root == "moe_mamba" and other not in {room, "errors"}:
                used.add((room, other))
                if other not in ALLOWED[room]:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            if root in {"launch", "tools", "tests"}:
                wrong.append(f"{path.relative_to(PACKAGE)} imports the command {name}")
            wrong += [
                f"{path.relative_to(PACKAGE)} imports {name}"
                for package in FOREIGN.get(room, ())
                if f"{name}.".startswith(f"{package}.")
            ]
    assert not wrong, "\n".join(wrong)
    unused = {(room, other) for room, others in ALLOWED.items() for other in others} - used
    assert not unused, f"nothing makes use of {unused}: close the door"


def test_no_modules_import_in_a_circle() -> None:
    modules = _modules()
    graph = {
        name: {module for module in modules for other in imported if module != name and _is_of(other, module, modules)}
        for name, imported in modules.items()
    }
    TopologicalSorter(graph).prepare()


def _is_of(imported: str, module: str, modules: dict[str, set[str]]) -> bool:
    """Whether an imported name, ``package.module.name`` or ``package.module``, comes from this module."""
    module = module.removesuffix(".__init__")
    return imported == module or (imported.rpartition(".")[0] == module and imported not in modules)
