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
ARCHIVES = {"main": ["main-v1"], "experts": ["experts-v1"], "lr": ["lr-v1"]}  # archive -> its tables
SECTIONS = ("What was run",)


@pytest.fixture(scope="module", params=ARCHIVES)
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(SCIENCE / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder, ARCHIVES[request.param]


def test_nothing_is_committed_that_is_not_checked() -> None:
    tables = [table for names in ARCHIVES.values() for table in names]
    assert sorted(tables) == sorted(path.parent.name for path in SCIENCE.glob("*/table.json"))
    assert sorted(ARCHIVES) == sorted(path.name.removesuffix(".tar.xz") for path in SCIENCE.glob("*.tar.xz"))
    assert sum(path.stat().st_size for path in SCIENCE.glob("*.tar.xz")) < 2e6


def test_tables_equal_those_computed_from_raw_metrics(unpacked: tuple[Path, list[str]]) -> None:
    output, tables = unpacked
    for name in tables:
        table, _, version = name.rpartition("-")
        spec = yaml.safe_load((ROOT / "configs" / "reproduce" / f"{table}.yaml").read_text())
        default = spec["versions"][version]["reference"]
        references = {
            row: said.get("reference", default) if said.get("compares", True) else row
            for row, said in spec["rows"].items()
        }
        runs = "runs" if spec["mini"].get("share", 1) == 1 else f"runs_{100 * spec['mini']['share']:.0f}"
        check_table(output, SCIENCE / name, references, runs)


def test_gathered_from_their_archive_tables_are_the_same(unpacked: tuple[Path, list[str]]) -> None:
    output, tables = unpacked
    for name in tables:
        table, _, version = name.rpartition("-")
        rows = json.loads((SCIENCE / name / "table.json").read_text())["rows"]
        only = ",".join(row for row, said in rows.items() if said["seeds"])
        main(table=table, version=version, only=only, gather=True, output=str(output))
        for file in ("table.json", "table.md"):
            assert (SCIENCE / name / file).read_text() == (output / name / file).read_text()


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
