"""Exported models are right under every Transformers that they are said to work with, and refused by older ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import tests.hf.class_under_version as script
from moe_mamba.convert.to_hf import export
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.hf.versions import NEWEST, OLDEST, TESTED
from tests import ROOT
from tests.hf.checkpoints import make_run
from tests.hf.conftest import OWN
from tests.hf.other_transformers import COMPANIONS, environment

SWIGLU: dict[str, Any] = {"kv_heads": 2, "activation": "swiglu"}
JAMBA: dict[str, Any] = SWIGLU | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
TOP_2: dict[str, Any] = {"router": "top_k", "top_k": 2}
EXPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moe_mamba": ({"pattern": "(ME)M*-", "rope_base": 500.0}, TOP_2 | {"inner": OWN | {"every": 2}}),
    "mamba": ({"pattern": "MM", "tied_head": True}, {}),
    "llama": ({"pattern": "*-*-", "rope_base": 500.0, **SWIGLU}, {}),
    "mixtral": ({"pattern": "*E*E", "rope_base": 500.0, **SWIGLU}, TOP_2 | {"renormalize": True}),
    "jamba": ({"pattern": "M-*EM-*E", **JAMBA}, TOP_2),
}
TEXT = "a▁b, cd"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each format, with ``expected.json``: what the trainer's model and tokenizer say."""
    root, runs = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("runs")
    tokens = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    tokenizer = BytesTokenizer()
    for name, (keys, moe) in EXPORTED.items():
        model = make_run(runs / name, keys, moe)
        assert export(runs / name, root / name, say=lambda line: None).name == name
        with torch.no_grad():
            expected = {
                "tokens": tokens.tolist(),
                "logits": model(tokens).logits.tolist(),
                "greedy": script.greedy(model, tokens).tolist(),
                "text": TEXT,
                "ids": tokenizer.encode(TEXT),
                "pipeline": script.greedy(model, torch.tensor([tokenizer.encode("ab")]))[0].tolist(),
            }
        (root / name / "expected.json").write_text(json.dumps(expected))
    return root


def _parameters() -> list[Any]:
    """The oldest and the newest in a slow run, the others in a long one; the installed one is in every other test."""
    ends = {TESTED[0], TESTED[-1]}
    marks = {version: pytest.mark.slow if version in ends else pytest.mark.long for version in TESTED}
    return [pytest.param(version, marks=mark) for version, mark in marks.items()]


@pytest.mark.parametrize("version", _parameters())
def test_exported_models_are_right_under(version: str, exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", script.__name__, str(exported), str(tmp_path)]
    # Without a terminal: the question about code, which Transformers 5 has for any tokenizer, is answered no.
    silent = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment(version, tmp_path), **silent)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["transformers"] == version
    checks = report["checks"]
    assert len(checks) == 1 + sum(1 for _ in script.of_class(tmp_path)) + 3 * len(EXPORTED)
    reasons: dict[str, list[str]] = {}  # with the names of the checks that fail for them
    for name, why in checks.items():
        if why is not None:
            reasons.setdefault(why, []).append(name)
    lines = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    assert not lines, "\n".join([f"of {len(checks)} checks fail under Transformers {version}:", *lines])


def test_the_card_says_which_were_tested(exported: Path) -> None:
    cards = {name: (exported / name / "README.md").read_text() for name in EXPORTED}
    assert all(f"Tested with Transformers {OLDEST} to {NEWEST}" in card for card in cards.values())
    assert {name for name, card in cards.items() if "an older one is refused" in card} == {"moe_mamba"}
    assert {name for name, card in cards.items() if "`use_mamba_kernels=False`" in card} == {"jamba"}


@pytest.mark.long
@pytest.mark.parametrize("name", ["package", "folder"])
def test_an_older_one_is_refused_in_one_line(name: str, exported: Path, tmp_path: Path) -> None:
    load = {
        "package": "import moe_mamba.hf.modeling_moe_mamba",
        "folder": (
            "from transformers import AutoModelForCausalLM\n"
            f"AutoModelForCausalLM.from_pretrained({str(exported / 'moe_mamba')!r}, trust_remote_code=True)"
        ),
    }[name]
    command = [sys.executable, "-c", load]
    done = subprocess.run(command, env=environment("4.56.2", tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "4.56.2" in last and f"{OLDEST} to {NEWEST}" in last


def test_the_versions_that_are_tested_begin_and_end_the_range() -> None:
    minors = [tuple(map(int, version.split(".")[:2])) for version in TESTED]
    assert minors == sorted(minors)
    assert [f"{major}.{minor}" for major, minor in (minors[0], minors[-1])] == [OLDEST, NEWEST]
    assert set(TESTED) <= set(COMPANIONS)
