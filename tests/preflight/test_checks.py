"""What is found in worlds that are made up."""

from pathlib import Path
from typing import Any

import pytest

from moe_mamba.preflight import checks
from moe_mamba.preflight.folders import Seen, grouped
from moe_mamba.preflight.report import Clock, DiskFacts, Finding, SourceFacts
from tests.preflight.made_up import GIB, ranks


def _wrong(findings: list[Finding]) -> list[Finding]:
    for finding in findings:
        assert "\n" not in finding.line
    return [finding for finding in findings if finding.level != "ok"]


def test_nothing_is_wrong_with_a_world_that_is_fine() -> None:
    findings = checks.check_facts(ranks({}, {}, {}, {}))
    assert not _wrong(findings)
    assert {finding.subject for finding in findings} >= {"versions", "revision", "kernels", "network", "data"}


DOCUMENTS = {"source": "a.jsonl", "files": 1, "size": 9, "content": "c", "is_documents": True}


@pytest.mark.parametrize(
    ("change", "level", "subject", "line"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.11.0"}}, "refused", "versions", "torch is 2.13.0 on node1"),
        ({"versions": {"python": "3.12.1", "torch": "2.13.0"}}, "refused", "versions", "3.12.1 on node2 (rank 3)"),
        ({"sources": "999"}, "refused", "revision", "abc, sources 999 on node2 (rank 3)"),
        (
            {"kernels": {"selective_scan": "torch", "rms_norm": "torch"}},
            "warning",
            "kernels",
            "torch on node2 (rank 3)",
        ),
        ({"kernels_build": "other"}, "warning", "kernels", "other on node2 (rank 3)"),
        ({"data": [SourceFacts(source="c4", fault="c4: no such file")]}, "refused", "data", "(seen on node2 (rank 3))"),
        (
            {"data": [SourceFacts(source="c4", files=3, size=GIB, content="d")]},
            *("refused", "data", "3 files of 1,073,741,824 bytes, d on node2 (rank 3)"),
        ),
        ({"open_files": 100}, "refused", "open files", "ulimit -n 148 before the start"),
        ({"open_files": 100, "most_open_files": 100}, "refused", "open files", "raise nofile"),
        ({"keepalive": "missing"}, "warning", "keep-alives", "ServerAliveInterval"),
    ],
)
def test_one_rank_that_differs_is_named(change: dict[str, Any], level: str, subject: str, line: str) -> None:
    (found,) = _wrong(checks.check_facts(ranks({}, {}, {}, change)))
    assert (found.level, found.subject) == (level, subject)
    assert line in found.line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"address": "127.0.1.1"}, "the host name node2 resolves to 127.0.1.1 there"),
        ({"address": None, "host_addresses": []}, "the host name node2 resolves to nothing"),
        ({"asked_interfaces": {"NCCL_SOCKET_IFNAME": "ib0"}}, "NCCL_SOCKET_IFNAME=ib0 names no interface of node2"),
        ({"unreached": {"node1": "timed out"}}, "node2 cannot connect to node1 at 10.0.0.1 (timed out)"),
    ],
)
def test_a_machine_that_others_cannot_reach_is_refused_with_the_line_to_set(change: dict[str, Any], line: str) -> None:
    (found,) = _wrong(checks.check_facts(ranks({}, {}, change, {})))
    assert (found.level, found.subject) == ("refused", "network")
    assert line in found.line
    assert "set GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in found.line
    assert not _wrong(list(checks.check_network(ranks(change, change))))  # a single machine talks over its loopback


def test_beginnings_of_names_and_exclusions_are_interfaces_to_nccl() -> None:
    for value in ("eth", "=eth0", "^docker"):
        assert not _wrong(
            list(checks.check_network(ranks({"asked_interfaces": {"NCCL_SOCKET_IFNAME": value}}, {}, {})))
        )


def test_copies_of_shards_may_have_other_times_but_documents_may_not() -> None:
    copy = {"data": [SourceFacts(source="c4", files=4, size=GIB, content="c", times="later")]}
    assert not _wrong(checks.check_facts(ranks({}, {}, copy, copy)))
    own, other = ({"data": [SourceFacts(**DOCUMENTS, times=times)]} for times in ("t", "later"))
    (found,) = _wrong(checks.check_facts(ranks(own, own, other, other)))
    assert "a.jsonl has other times of change on node2" in found.line


def _seen(*groups: set[int]) -> list[Seen]:
    """What ranks saw, two a machine."""
    return [Seen(rank, f"node{rank // 2 + 1}", frozenset(group)) for rank, group in enumerate(groups)]


def test_machines_with_a_folder_of_their_own_are_told_apart() -> None:
    seen = _seen({0, 1, 4, 5}, {0, 1, 4, 5}, {2, 3}, {2, 3}, {0, 1, 4, 5}, {0, 1, 4, 5})
    (found,) = checks.check_folder(seen)
    assert (found.level, found.machines) == ("refused", ["node1", "node2"])
    assert found.line.startswith("run.folder is not shared: node2 and node1 (rank 0) each have one of their own")
    folder = grouped("run.folder", Path("run"), seen)
    assert folder.groups == [["node1", "node3"], ["node2"]]
    assert not folder.is_seen_by_all
    everyone = set(range(4))
    assert [one.level for one in checks.check_folder(_seen(everyone, everyone, everyone, everyone))] == ["ok"]
    (late,) = checks.check_folder(_seen(everyone, everyone, {0, 1}, everyone))
    assert (late.level, late.machines) == ("refused", ["node2"])
    (unwritable,) = checks.check_folder([*_seen({0, 1}, {0, 1}), Seen(2, "node2", frozenset(), "read-only")])
    assert "run.folder on node2: read-only" in unwritable.line


def test_an_unshared_cache_is_refused_only_where_documents_are_sharded_into_it() -> None:
    seen = _seen({0, 1}, {0, 1}, {2, 3}, {2, 3})
    assert not list(checks.check_cache(ranks({}, {}, {}, {}), seen))
    documents = {"data": [SourceFacts(**DOCUMENTS)]}
    (found,) = checks.check_cache(ranks(*[documents] * 4), seen)
    assert found.level == "refused"
    assert "node2 cannot see what rank 0 on node1 makes there of a.jsonl" in found.line


def test_a_clock_that_is_off_is_a_warning_with_machine_and_offset() -> None:
    clocks = [
        Clock(machine="node2", offset_seconds=3600.25, delay_seconds=0.001),
        Clock(machine="node3", offset_seconds=-0.2, delay_seconds=0.001),
    ]
    (found,) = checks.check_clocks(clocks)
    assert (found.level, found.machines) == ("warning", ["node2"])
    assert found.line.startswith("the clock of node2 is 3,600.2 s ahead of rank 0's")
    assert [one.level for one in checks.check_clocks(clocks[1:])] == ["ok"]


def test_the_disk_has_room_for_two_checkpoints_those_there_counted() -> None:
    def level(free: int, there: int) -> str:
        world = ranks({}, {"disk": DiskFacts(free_bytes=free * GIB, checkpoints=there)})
        return next(iter(checks.check_disk(world, 10 * GIB))).level

    assert [level(19, 0), level(20, 0), level(19, 1), level(9, 5)] == ["refused", "ok", "ok", "refused"]


def test_little_shared_memory_is_a_warning_for_several_gpus() -> None:
    small: dict[str, Any] = {"shared_memory_bytes": 64 << 20}
    assert not _wrong(list(checks.check_shared_memory(ranks(small, small))))
    (found,) = checks.check_shared_memory(ranks(*[small | {"device": "H200"}] * 2))
    assert found.level == "warning"
    assert "--shm-size" in found.line


def test_the_slow_machine_is_named_with_its_ratio() -> None:
    rates = {"node1": 10.0, "node2": 10.5, "node3": 6.0, "node4": 9.8}
    (found,) = checks.check_speed("the matrix product", "FLOP/s", rates, 0.8)
    assert found.machines == ["node3"]
    assert "0.60 of the median of the others (6 against 10 FLOP/s)" in found.line
    assert not list(checks.check_speed("the copy", "bytes/s", {"node1": 3.0}, 0.8))


def test_sizes_for_people() -> None:
    assert [checks.size_of(n) for n in (12, 3 << 10, 5 << 40)] == ["12 bytes", "3 KiB", "5 TiB"]
