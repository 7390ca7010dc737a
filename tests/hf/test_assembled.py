"""The two files that Transformers loads are what the package's source gives, and need nothing of it."""

import ast
from dataclasses import replace
from pathlib import Path

import assemble_hf
import pytest

from moe_mamba.errors import UserError
from moe_mamba.hf import assemble as assembler

FILES = assembler.assemble()
FOLDER = assembler.PACKAGE / "hf"


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_not_stale(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == FILES[name], "run python tools/assemble_hf.py"


@pytest.mark.slow
def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    monkeypatch.setattr(assemble_hf, "PACKAGE", tmp_path)
    with pytest.raises(UserError, match=r"configuration_moe_mamba.py is stale: run python tools/assemble_hf.py"):
        assemble_hf.main(check=True)
    assemble_hf.main()
    assemble_hf.main(check=True)
    path = tmp_path / "hf" / assembler.MODELING
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"modeling_moe_mamba.py is stale"):
        assemble_hf.main(check=True)


def test_only_torch_and_transformers_are_needed() -> None:
    import sys

    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name, text in FILES.items():
        tree = ast.parse(text)
        tried = {id(node) for attempt in ast.walk(tree) if isinstance(attempt, ast.Try) for node in attempt.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and id(node) not in tried:
                local = node.level == 1 and node.module == "configuration_moe_mamba"
                assert local or (node.module or "").split(".")[0] in allowed, name
        assert "flops" not in text, "what a model counts about itself stays at home"


def test_transformers_asks_for_no_other_package() -> None:
    pytest.importorskip("transformers")
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    path = FOLDER / assembler.MODELING
    assert "moe_mamba" not in get_imports(path)
    assert get_relative_imports(path) == ["configuration_moe_mamba"]


def test_a_change_that_the_assembler_does_not_know_is_said() -> None:
    part = next(part for part in assembler.PARTS if part.path == "model/layer.py")
    with pytest.raises(ValueError, match=r"layer.py lacks Layer.gone"):
        assembler._take(replace(part, without=("Layer.gone",)))
    with pytest.raises(ValueError, match=r"layer.py lacks gone"):
        assembler._take(replace(part, only=("gone",), without=()))
    with pytest.raises(ValueError, match=r"has 0 times what is to be left out"):
        assembler._take(replace(part, drop=("no such line",)))
