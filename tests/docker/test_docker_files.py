"""What `docker/` holds, without an image: the Dockerfile by hadolint, constraints, compose.yaml, the health check."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT
from tests.world import free_port

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
PIN = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)
BESIDE_PYTHON = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def lint(name: str, *files: Path) -> str:
    program = shutil.which(name, path=BESIDE_PYTHON)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([program, *map(str, files)], capture_output=True, text=True).stdout


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    assert lint("hadolint", DOCKER / "Dockerfile") == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.replace("USER 1000:1000", "USER root"))
    assert "DL3002" in lint("hadolint", worse)


def test_the_scripts_pass_shellcheck() -> None:
    assert lint("shellcheck", *sorted(DOCKER.glob("*.sh"))) == ""


def test_both_images_are_set_up_alike() -> None:
    """Docker has no way to write the last stage of both once."""
    cpu, cuda = re.findall(r"(?ms)^FROM (?:cpu|cuda)-base AS (?:cpu|cuda)\n(.*?)(?=^FROM|\Z)", DOCKERFILE)
    cuda = re.sub(r"(?ms)^RUN apt-get.*?lists/\*\n| +CUDA_CACHE_PATH=.*?\n", "", cuda)
    cuda = cuda.replace("--from=cuda-builder", "--from=cpu-builder").replace("on NVIDIA GPUs", "on CPUs")
    cpu, cuda = (re.sub(r"(?m)^#.*\n", "", stage) for stage in (cpu, cuda))
    assert cpu.strip() == cuda.strip()


def test_the_build_context_has_all_that_is_copied_and_little_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKERFILE)
    assert {path.split("/")[0] for paths in copied for path in paths.split()} - {"."} <= let_in


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_constraints_pin_every_dependency_once(target: str) -> None:
    own = (DOCKER / f"constraints-{target}.txt").read_text()
    assert "\n-c ../constraints.txt\n" in own
    shared = dict(PIN.findall((ROOT / "constraints.txt").read_text()))
    pins = shared | dict(PIN.findall(own))
    labelled = {name: version for name, version in pins.items() if "+" in version}
    assert labelled == ({"torch": "2.13.0+cpu"} if target == "cpu" else {})
    assert all(pins[name].split("+")[0] == version for name, version in shared.items())  # pip knows no later one wins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["cuda"] if target == "cuda" else [])
    for requirement in wanted:
        assert canonicalize_name(Requirement(requirement).name) in {canonicalize_name(name) for name in pins}


def test_the_images_of_torch_have_the_version_that_is_pinned() -> None:
    pinned = dict(PIN.findall((DOCKER / "constraints-cuda.txt").read_text()))
    versions = set(re.findall(r"pytorch/pytorch:([\d.]+)-cuda([\d.]+)-", DOCKERFILE))
    assert versions == {(pinned["torch"], ".".join(pinned["cuda-toolkit"].split(".")[:2]))}


@pytest.fixture
def health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple]:
    """The health check's exit code and line, in a container that is ten minutes old, with runs in `tmp_path`."""
    monkeypatch.setenv("MOE_MAMBA_RUNS", str(tmp_path))
    monkeypatch.setattr("socket.gethostname", lambda: "node0")
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() - 600)

    def call() -> tuple[int, str]:
        code = runpy.run_path(str(DOCKER / "healthcheck.py"))["main"]()
        return code, capsys.readouterr().out

    return call


def beat(folder: Path, age: float, host: str = "node0") -> None:
    path = folder / "heartbeats" / host
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": 1}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_training_without_a_sign_of_life_is_unhealthy(health: Callable[[], tuple], tmp_path: Path) -> None:
    assert health()[0] == 0  # nothing has begun
    beat(tmp_path / "old", age=700)  # of a container before this one
    beat(tmp_path / "demo", age=1, host="node1")
    assert health() == (0, f"no training has begun below {tmp_path}\n")
    beat(tmp_path / "demo", age=400)
    assert health()[0] == 1
    beat(tmp_path / "sweep" / "a", age=10)
    assert health()[0] == 0


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_starts_two_nodes_that_find_each_other_and_share_their_files() -> None:
    services = compose()["services"]
    first, second = services.values()
    assert [service["hostname"] for service in (first, second)] == list(services)
    assert first["command"] == second["command"] and f"--nnodes={len(services)}" in first["command"]
    (endpoint,) = [word for word in first["command"] if word.startswith("--rdzv-endpoint=")]
    assert re.fullmatch(rf"--rdzv-endpoint={first['hostname']}:\d+", endpoint)
    volumes = {volume.split(":")[0]: volume.split(":")[1] for volume in first["volumes"]}
    assert first["volumes"] == second["volumes"] and volumes.keys() == compose()["volumes"].keys()
    assert set(volumes.values()) <= set(json.loads(re.findall(r"(?m)^VOLUME (.*)$", DOCKERFILE)[0]))
    build = first["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert f" AS {build['target']}\n" in DOCKERFILE


@pytest.mark.slow
def test_the_two_commands_of_compose_train_together(tmp_path: Path) -> None:
    """As processes of one host: the name of the first service becomes this host, its port one that is free."""
    port = free_port()
    tiny = [
        "--model.d_model=32",
        "--model.repeat=1",
        "--model.vocab_size=300",
        "--train.steps=3",
        "--data.sequence_length=32",
    ]
    nodes = []
    for service in compose()["services"].values():
        words = [word.replace("node0:29400", f"127.0.0.1:{port}") for word in service["command"]]
        words = [word.replace("runs/two_nodes", str(tmp_path / "run")) for word in words]
        command = [*words, *tiny, "--data.tokenizer=bytes", f"--data.cache={tmp_path / 'cache'}"]
        environment = {**os.environ, "PATH": BESIDE_PYTHON, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{service['hostname']}.txt").open("w") as log:
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [node.wait(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert codes == [0, 0], logs
    assert "layout    2 x cpu" in logs["node0.txt"] + logs["node1.txt"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) == 3


LAUNCHER = """
import os, subprocess, sys
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('ready', flush=True)"
wait = "; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", rank + wait], env={**os.environ, "LOCAL_RANK": "0"})
sys.exit(child.wait() + 3)
"""


def test_a_container_that_is_stopped_stops_its_ranks_and_not_their_launcher() -> None:
    command = [sys.executable, str(DOCKER / "start.py"), sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=60) == 3  # the launcher saw its rank end by itself
    missing = subprocess.run([*command[:2], "no-such-command"], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (
        1,
        "error: no-such-command cannot be run here (No such file or directory)\n",
    )
