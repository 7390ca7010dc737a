"""launch/kubernetes/: manifests against strict schemas, what they promise each other, and pods as processes."""

import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from moe_mamba.config import CheckpointConfig, Config
from moe_mamba.config_file import keys
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.faults.test_watchdog import wait
from tests.launch.schemas import check
from tests.train.runs import curve, run, same_weights
from tests.world import World, free_port

FOLDER = ROOT / "launch" / "kubernetes"
MANIFESTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
JOBS = ["job", "pytorchjob", "trainjob"]
STEPS = 300
PACKAGES = {"kubernetes_validate": "kubernetes-validate", "kubeflow_trainer_api": "kubeflow-trainer-api"} | {
    "kubeflow": "kubeflow-training"
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


@pytest.fixture(scope="module")
def schemas() -> Iterator[None]:
    """Skip where the packages are not there; read their files once."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"no schemas here: pip install {' '.join(missing)}")
    from kubernetes_validate import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema(schemas: None, name: str) -> None:
    for document in documents(name):
        check(document)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys, whose parents have keys of their own choice left out: labels, selectors, amounts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path[-1:] not in [("labels",), ("selector",), ("requests",), ("limits",), ("pytorchReplicaSpecs",)]:
                yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_key_anywhere_fails(schemas: None, name: str) -> None:
    for document in documents(name):
        for *parents, key in places(document):
            if key in ("kind", "apiVersion") and not parents:
                continue
            changed = copy.deepcopy(document)
            inner = changed
            for parent in parents:
                inner = inner[parent]
            inner[f"{key}s"] = inner.pop(key)
            with pytest.raises(Exception, match=f"{key}|required"):
                check(changed)


def pod(name: str) -> dict[str, Any]:
    """The pod's spec in a manifest."""
    match documents(name)[-1]:
        case {"kind": "Job", "spec": spec}:
            return spec["template"]["spec"]
        case {"kind": "PyTorchJob", "spec": spec}:
            return spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        case {"kind": "TrainingRuntime", "spec": spec}:
            (job,) = spec["template"]["spec"]["replicatedJobs"]
            return job["template"]["spec"]["template"]["spec"]
    raise AssertionError(name)


def arguments(name: str) -> list[str]:
    """What launch/train.py is given."""
    (container,) = pod(name)["containers"]
    return container.get("args") or documents(name)[0]["spec"]["trainer"]["args"]


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_has_the_time_to_save(name: str) -> None:
    script = (FOLDER / "pod.sh").read_text()
    agent = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", script)[1])  # type: ignore[index]
    given = [int(word.partition("=")[2]) for word in arguments(name) if word.startswith("--checkpoint.grace=")]
    grace = max([CheckpointConfig().grace, *given])
    assert grace + 10 <= agent
    assert agent + 20 <= pod(name)["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", JOBS)
def test_what_a_manifest_gives_to_the_training_exists(name: str) -> None:
    flags = dict(word.removeprefix("--").split("=", 1) for word in arguments(name))
    assert (ROOT / flags.pop("config")).is_file()
    assert flags.keys() <= {key for key, _, _ in keys()}
    assert set(flags) & {f"{section}.grace" for section in Config.model_fields}
    (container,) = pod(name)["containers"]
    assert container["command"] == ["bash", "launch/kubernetes/pod.sh"]
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claims = {document["metadata"]["name"] for document in documents("volumes")}
    assert {mounts[path]["persistentVolumeClaim"]["claimName"] for path in ("/data", "/runs")} == claims
    assert pod(name)["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_a_user_must_change_is_listed_at_the_top(name: str) -> None:
    head, _, body = (FOLDER / f"{name}.yaml").read_text().partition("\napiVersion:")
    assert "CHANGE" in head
    listed = set(re.findall(r"(?m)^#   (\d)\. ", head))
    assert set(re.findall(r"# CHANGE (\d)", body)) == listed
    assert listed or "# CHANGE" in body


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("age", "is_training", "is_alive"), [(None, True, True), (60, True, True), (600, True, False), (600, False, True)]
)
def test_the_probe_fails_only_where_processes_train_without_a_sign_of_life(
    name: str, age: int | None, is_training: bool, is_alive: bool, tmp_path: Path
) -> None:
    (container,) = pod(name)["containers"]
    shell, flag, text = container["livenessProbe"]["exec"]["command"]
    proc = tmp_path / "proc"  # of this pod alone, as a container's is
    (proc / "17").mkdir(parents=True)
    (proc / "17" / "environ").write_bytes(b"RANK=8\0LOCAL_RANK=0\0" if is_training else b"HOME=/\0")
    if age is not None:
        file = tmp_path / "heartbeats" / os.uname().nodename
        file.parent.mkdir()
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    text = text.replace("/proc/[0-9]*/", f"{proc}/[0-9]*/")
    done = subprocess.run([shell, flag, text], env=os.environ | {"RUN_FOLDER": str(tmp_path)})
    assert (done.returncode == 0) is is_alive


class Pods:
    """The pods of job.yaml, as processes of this machine."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.words, self.port = folder, words, free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, index: int) -> subprocess.Popen[bytes]:
        (container,) = pod("job")["containers"]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {variable["name"]: variable.get("value", "") for variable in container["env"]}
        environment |= {"RUN_FOLDER": str(self.folder), "POD_INDEX": str(index), "POD_IP": "127.0.0.1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.port)}
        screen = self.folder.with_name(f"pod-{index}-{len(self.processes)}.txt").open("w")
        process = subprocess.Popen(
            [*container["command"], *self.words], cwd=ROOT, env=environment, stdout=screen, stderr=screen,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def wait_for_lines(self, count: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count, 300)

    def lines(self) -> int:
        return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """What a lost machine is."""
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()


@pytest.fixture
def pods(tiny: Path, tmp_path: Path) -> Iterator[Pods]:
    keys = (f"--train.steps={STEPS}", "--train.validate_every=0", "--checkpoint.every=20", "--train.sample_tokens=0")
    pods = Pods(tmp_path / "run", f"--config={tiny}", *keys)
    yield pods
    for process in pods.processes:
        pods.kill(process)


@pytest.mark.slow
def test_pods_that_come_back_form_one_new_world_and_the_run_is_as_if_nothing_was(
    pods: Pods, world: World, tiny: Path, tmp_path: Path
) -> None:
    second = pods.start(1)  # it waits for the first
    first = pods.start(0)
    pods.wait_for_lines(5)
    second.terminate()  # drained: all save, this pod ends, the other waits
    assert second.wait(100) == 138
    saved = pods.lines()
    assert first.poll() is None
    second = pods.start(1)
    pods.wait_for_lines(saved + 25)
    pods.kill(first)  # the machine that holds the rendezvous is lost
    assert second.wait(200) == 138
    first, second = pods.start(0), pods.start(1)
    assert (first.wait(400), second.wait(60)) == (0, 0)
    whole = tmp_path / "whole"
    keys = {"train.steps": STEPS, "train.validate_every": 0, "checkpoint.every": 0, "train.sample_tokens": 0}
    run(world, tiny, whole, ranks=2, **keys)
    assert curve(read_metrics(pods.folder)) == curve(read_metrics(whole))
    same_weights(pods.folder, whole)


def test_a_pod_ends_with_code_2_where_the_mistake_is_the_users(tmp_path: Path) -> None:
    pods = Pods(tmp_path / "run", "--no.such_key=1")
    (tmp_path / "bin").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"  # which turns every code into 1
    torchrun.write_text(f'#!/bin/sh\necho "$@" >&2\nshift 8\n{sys.executable} "$@" || exit 1\n')
    torchrun.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(torchrun))
        process = pods.start(0)
    assert process.wait(60) == 2
    output = (tmp_path / "pod-0-0.txt").read_text()
    assert "error: unknown key no: " in output
    assert "--nnodes=2:2 --nproc-per-node=1 --max-restarts=10 --local-addr=127.0.0.1 " in output
