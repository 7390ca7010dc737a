"""The committed results: each table is the one that its raw metrics make, and the page quotes it."""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_mamba.commands.reproduce import main
from tests import ROOT
from tests.reproduce.independent import check_table

SCIENCE = ROOT / "docs" / "measurements" / "science"
ARCHIVE = SCIENCE / "runs.tar.xz"  # of the runs of all tables
TABLES = ["main-v1", "experts-v1", "lr-v1", "rates-ours"]
SECTIONS = ("What was run",)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_nothing_is_committed_that_is_not_checked() -> None:
    assert sorted(TABLES) == sorted(path.parent.name for path in SCIENCE.glob("*/table.json"))
    assert list(SCIENCE.glob("*.tar.*")) == [ARCHIVE]
    assert ARCHIVE.stat().st_size < 2e6


@pytest.mark.parametrize("name", TABLES)
def test_a_table_equals_one_computed_from_raw_metrics(unpacked: Path, name: str) -> None:
    table, _, version = name.rpartition("-")
    spec = yaml.safe_load((ROOT / "configs" / "reproduce" / f"{table}.yaml").read_text())
    default = spec["versions"][version]["reference"]
    references = {
        row: said.get("reference", default) if said.get("compares", True) else row for row, said in spec["rows"].items()
    }
    runs = "runs" if spec["mini"].get("share", 1) == 1 else f"runs_{100 * spec['mini']['share']:.0f}"
    check_table(unpacked, SCIENCE / name, references, runs)


@pytest.mark.parametrize("name", TABLES)
def test_gathered_from_the_archive_a_table_is_the_same(unpacked: Path, name: str) -> None:
    table, _, version = name.rpartition("-")
    rows = json.loads((SCIENCE / name / "table.json").read_text())["rows"]
    only = ",".join(row for row, said in rows.items() if said["seeds"])
    main(table=table, version=version, only=only, gather=True, output=str(unpacked))
    for file in ("table.json", "table.md"):
        assert (SCIENCE / name / file).read_text() == (unpacked / name / file).read_text()


def test_a_crossing_is_told_where_the_reference_is_no_point_of_the_axis() -> None:
    said = {name: (SCIENCE / name / "table.md").read_text() for name in ("experts-v1", "lr-v1")}
    assert "Over experts, the loss is below that of Mamba from the first on." in said["experts-v1"]
    assert "- Over " not in said["lr-v1"]


def test_the_page_quotes_the_tables() -> None:
    page = (ROOT / "docs" / "science.md").read_text()
    known = set(re.findall(r"\d\.\d{4}", "".join(path.read_text() for path in SCIENCE.glob("*/table.md"))))
    for path in SCIENCE.glob("*/table.json"):
        known |= {f"{abs(number):.4f}" for number in _losses(json.loads(path.read_text())["rows"])}
    for section in SECTIONS:
        quoted = re.findall(r"\d\.\d{4}", page.split(f"## {section}\n")[1].split("\n## ")[0])
        assert quoted
        assert [number for number in quoted if number not in known] == []


def _losses(rows: dict[str, Any]) -> Iterator[float]:
    """Of all seeds, and the differences between rows of one seed."""
    seeds = [{seed: one["loss"] for seed, one in said["seeds"].items()} for said in rows.values()]
    for losses in seeds:
        yield from losses.values()
        for others in seeds:
            yield from (losses[seed] - others[seed] for seed in losses.keys() & others.keys())
