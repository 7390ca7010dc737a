"""A small corpus, a small config, and a run of them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.train.runs import STEPS, run
from tests.world import World


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents with some structure, as JSON lines."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 300), ("validation", 20)):
        lines = [
            json.dumps({"text": f"{n} plus {n % 7} is {n + n % 7}; twice that is {2 * (n + n % 7)}."})
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> Path:
    """A config of a run that takes a second."""
    config = {
        "model": {"pattern": "ME", "repeat": 1, "d_model": 16, "d_state": 4, "vocab_size": 257},
        "moe": {"experts": 4, "d_expert": 16},
        "data": {
            "train": [str(corpus / "train.jsonl")],
            "validation": [str(corpus / "validation.jsonl")],
            "tokenizer": "bytes",
            "cache": str(corpus / "cache"),
            "sequence_length": 32,
        },
        "train": {
            "steps": STEPS,
            "global_batch": 8,
            "learning_rate": 1e-2,
            "warmup": 0.2,
            "validate_every": 3,
            "sample_tokens": 4,
        },
        "checkpoint": {"every": 2, "keep": 3},
        "logging": {"plots": False},  # they take longer than the run
    }
    path = corpus / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def plain(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(world, tiny, folder, logging__plots=True)
    return folder
