"""The whole preflight, and the short form, in small worlds of real processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_mamba.command_line import run_command
from moe_mamba.commands.preflight import main
from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.errors import UserError
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.preflight import compute, facts, links
from moe_mamba.preflight.full_form import preflight
from moe_mamba.preflight.report import Report, schema
from moe_mamba.preflight.short_form import check_machines
from moe_mamba.run.console import Screen
from tests import ROOT
from tests.world import World, free_port


def _as_machine(patch: pytest.MonkeyPatch, clock: float = 0.0) -> int:
    """Let this worker be on a machine of its own, whose clock is off by so many seconds; its rank."""
    rank, now = int(os.environ["RANK"]), time.time
    patch.setenv("LOCAL_WORLD_SIZE", "1")
    patch.setenv("LOCAL_RANK", "0")
    patch.setattr(socket, "gethostname", lambda: f"node{rank + 1}")
    if rank > 0 and clock:
        patch.setattr(time, "time", lambda: now() + clock)
    return rank


def _store(ranks: Ranks) -> dist.Store:
    """As the meeting's; these machines have nothing but one machine's loopback, which a meeting would refuse."""
    return dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=ranks.is_first, wait_for_workers=False)


def _config(tiny: str, folder: Path, cache: Path) -> Config:
    return load_config(tiny, {"run.folder": str(folder), "data.cache": str(cache)})


def _start(tiny: str, shared: str, own: tuple[str, ...] = (), interface: str = "lo", clock: float = 0.0) -> list[str]:
    """On a rank: the lines of a start on several machines, the refusal last; those of `own` are folders of its own."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        rank = _as_machine(patch, clock)
        patch.setenv("GLOO_SOCKET_IFNAME", interface)
        # one machine's loopback is all that the workers have
        patch.setattr("moe_mamba.preflight.short_form.is_loopback", lambda address: False)
        patch.setattr("moe_mamba.preflight.checks.is_loopback", lambda address: False)
        folders = {name: Path(shared) / (f"{name}-{rank}" if name in own else name) for name in ("run", "cache")}
        try:
            ranks = Ranks.from_environment()
            check_machines(_config(tiny, *folders.values()), ranks, _store(ranks), said.append)
        except UserError as error:
            said.append(f"refused: {error}")
        leftovers = list(Path(shared).rglob(".preflight-*"))
        assert not leftovers or said
    return said


def test_a_start_on_machines_that_are_fine_says_nothing(world: World, tiny: Path, tmp_path: Path) -> None:
    assert world.run(_start, str(tiny), str(tmp_path), ranks=3) == [[], [], []]
    assert not list(tmp_path.rglob(".preflight-*"))


def test_an_unshared_run_folder_is_refused_alike_by_all_ranks(world: World, tiny: Path, tmp_path: Path) -> None:
    lines = world.run(_start, str(tiny), str(tmp_path), own=("run",), clock=3600.0)
    assert lines[0] == lines[1]
    warning, refusal = lines[0]
    assert warning.startswith("warning   the clock of node2 is 3,600.0 s ahead of rank 0's")
    assert refusal.startswith("refused: run.folder is not shared: node2 and node1 (rank 0)")


def test_an_unshared_cache_and_a_missing_interface_are_refused(world: World, tiny: Path, tmp_path: Path) -> None:
    (line,), _ = world.run(_start, str(tiny), str(tmp_path), own=("cache",))
    assert "data.cache is not shared: node2 cannot see what rank 0 on node1 makes there of" in line
    (line,), _ = world.run(_start, str(tiny), str(tmp_path), interface="ib7")
    assert line.startswith("refused: GLOO_SOCKET_IFNAME=ib7 names no interface of node1, which has ")
    assert "(and 1 more: launch/preflight.py tells all)" in line


def _start_without_the_last(tiny: str, shared: str) -> str:
    """On a rank: how it ends where the last rank never comes."""
    with pytest.MonkeyPatch.context() as patch:
        rank = _as_machine(patch)
        patch.setenv("WORLD_SIZE", "3")
        config = load_config(tiny, {"run.folder": shared, "parallel.timeout": "2"})
        ranks = Ranks.from_environment()
        store = _store(ranks)
        with pytest.raises(UserError) as refusal:
            check_machines(config, ranks, store, print)
        dist.barrier()  # rank 0 has the store
        assert rank < 2
        return str(refusal.value)


def test_a_rank_that_does_not_come_is_named_to_all(world: World, tiny: Path, tmp_path: Path) -> None:
    first, second = world.run(_start_without_the_last, str(tiny), str(tmp_path))
    assert first == second
    assert first.startswith("1 of 3 ranks did not come within 2 s: 2: ")


def _preflight(tiny: str, folder: str, output: str) -> tuple[list[str], int]:
    """On a rank: the lines of a preflight whose measures are short, and how much is refused."""
    dist.destroy_process_group()  # a preflight makes its own
    Path(folder).mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (compute, "SECONDS", 0.01),
            (compute, "STORAGE_BYTES", 1 << 20),
            (links, "MESSAGE_BYTES", 1 << 16),
        ):
            patch.setattr(module, name, value)
        with Screen(Path(folder) / "log.txt") as screen:
            refused = preflight(_config(tiny, Path(folder), Path(folder) / "cache"), Path(output), screen)
    return (Path(folder) / "log.txt").read_text().splitlines(), len(refused)


def test_the_report_holds_what_its_models_say(world: World, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    (said, refused), other = world.run(_preflight, str(tiny), str(tmp_path / "run"), str(output))
    assert refused == other[1] == 0
    assert said[-1].startswith(f"report    {output}")
    report = Report.model_validate_json(output.read_text())
    assert json.loads(output.read_text()) == json.loads(report.model_dump_json())
    assert (report.world_size, list(report.machines.values())) == (2, [[0, 1]])
    assert [fact.rank for fact in report.ranks] == [0, 1]
    assert report.checkpoint_bytes == 12 * _parameters(tiny)
    assert report.folders[0].is_seen_by_all
    measures = report.measures
    assert measures is not None
    assert len(measures.compute) == 2
    for one in measures.compute:
        assert min(one.matmul_flops, one.copy_bytes, one.scan_tokens or 0, one.grouped_flops or 0) > 0
    assert [link.ranks for link in measures.links] == [(0, 1)]
    assert measures.storage[0].bytes >= 1 << 20
    reduced, exchanged = measures.collectives
    assert (reduced.operation, exchanged.operation) == ("all_reduce", "all_to_all")
    assert reduced.config_bytes == 4 * _parameters(tiny)
    assert exchanged.config_bytes == measures.sizes.tokens * 16 * 1 * 4  # tokens x d_model x top_k x fp32
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".preflight")]


def _parameters(tiny: Path) -> int:
    from moe_mamba.model.language_model import LanguageModel

    config = load_config(str(tiny), {})
    return sum(p.numel() for p in LanguageModel.on_meta(config.model, config.moe).parameters())


def test_help_documents_every_field_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--help"])
    run_command(main)
    shown = capsys.readouterr().out
    assert schema() in shown
    for name in ("format_version", "offset_seconds", "latency_seconds", "matmul_flops", "is_documents", "run.folder="):
        assert name in shown


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    refusal: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "nowhere" / "report.json"
    line = refusal(main, f"--config={tiny}", f"--run.folder={tmp_path / 'run'}", f"--output={output}")
    assert f"{output} cannot be written: make the folder {output.parent}" in line


def test_sources_are_told_apart_without_git(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one = 1\n")
    before = facts.hash_of_sources(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert facts.hash_of_sources(tmp_path) == before
    (tmp_path / "a.py").write_text("one = 2\n")
    assert facts.hash_of_sources(tmp_path) != before


@pytest.mark.slow
def test_a_launcher_runs_it_and_a_refusal_is_exit_code_2(tiny: Path, tmp_path: Path) -> None:
    line = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]
    line += ["launch/preflight.py", f"--config={tiny}", f"--run.folder={tmp_path / 'run'}"]
    line += ["--data.train=nowhere.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ok        versions: the same on all ranks" in done.stdout
    assert "refused   data: nowhere.jsonl: no such file" in done.stdout
    assert done.stderr.count("error: a finding is refused, see above") == 1
    assert Report.model_validate_json((tmp_path / "run" / "preflight.json").read_text()).world_size == 2


INNER = {"model.pattern": "M", "moe.inner.projections": "gate", "moe.inner.experts": 6}


@pytest.mark.parametrize(
    ("keys", "layout", "expected"),
    [
        ({"model.pattern": "ME"}, (1, 2), [4, 2 * 256, 512, 64]),
        (
            {"model.pattern": "M", "moe.inner.projections": "gate", "moe.inner.experts": 6},
            (1, 2),
            [3, 2 * 256, 512, 1024],
        ),
        (
            {"model.pattern": "M", "moe.inner.projections": "gate", "moe.inner.experts": 6},
            (2, 2),
            [6, 2 * 256, 512, 512],
        ),
        ({"model.pattern": "M"}, (1, 1), None),
    ],
)
def test_the_grouped_product_has_the_sizes_of_the_experts_that_there_are(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], layout: tuple[int, int], expected: list[int] | None
) -> None:
    monkeypatch.setitem(compute.MOST_WEIGHTS, "cpu", 1e12)
    monkeypatch.setitem(compute.MOST_OPERATIONS, "cpu", 1e15)
    config = load_config(None, {"moe.experts": 8, "moe.d_expert": 64} | keys)
    topology = Topology(Ranks(0, 4, 0, 4), *layout)
    assert compute.sizes(config, topology, micro_batch=2).grouped == expected
