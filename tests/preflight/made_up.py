"""Facts of ranks that do not exist."""

from typing import Any

from moe_mamba.preflight.report import DiskFacts, Interface, RankFacts, SourceFacts

GIB = 1 << 30


def ranks(*changes: dict[str, Any], per_machine: int = 2) -> list[RankFacts]:
    """Ranks with nothing wrong, `per_machine` on each machine, each with its changes."""
    return [_rank(rank, per_machine, change) for rank, change in enumerate(changes)]


def _rank(rank: int, per_machine: int, change: dict[str, Any]) -> RankFacts:
    machine = rank // per_machine + 1
    fine: dict[str, Any] = {
        "rank": rank,
        "local_rank": rank % per_machine,
        "machine": f"node{machine}",
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "revision": "abc",
        "sources": "123",
        "kernels": {"selective_scan": "cpu", "rms_norm": "torch"},
        "kernels_build": "key",
        "host_addresses": [f"10.0.0.{machine}"],
        "interfaces": [Interface(name="lo", address="127.0.0.1"), Interface(name="eth0", address=f"10.0.0.{machine}")],
        "address": f"10.0.0.{machine}",
        "route_interface": "eth0",
        "data": [SourceFacts(source="c4", files=4, size=GIB, content="c", times="t")],
        "disk": DiskFacts(free_bytes=100 * GIB),
        "shared_memory_bytes": GIB,
        "open_files": 1024,
        "most_open_files": 4096,
    }
    return RankFacts(**fine | change)
