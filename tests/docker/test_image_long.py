"""The image for CPUs, built and run as its user would: any user id, no network, read-only files, 64 MB to share."""

import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.docker.containers import Store, what_is_missing

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
]
LINES = re.findall(r"(?m)^docker (?:build|run) .* moe_mamba:cpu(?: .*)?$", (ROOT / "docs" / "docker.md").read_text())
BUILD, DEMO, STRANGER, MOUNTED, GENERATE = [shlex.split(line)[2:] for line in LINES]
CUT = ("--train.steps=3", "--train.validate_every=3", "--checkpoint.every=3")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """With the image for CPUs."""
    folder = tmp_path_factory.mktemp("store")
    made = Store(folder)
    try:
        begin = time.monotonic()
        made.make_base()
        based = time.monotonic()
        made.build(BUILD, "--build-arg=TORCH_INDEX=", "--build-arg=REVISION=0123abc")
        print(f"\nbase in {based - begin:.0f} s, image in {time.monotonic() - based:.0f} s")
        yield made
    finally:
        made.remove()


def type_line(words: list[str], folder: Path) -> list[str]:
    """The words after ``docker run``, as a user of another id than the image's types them in a folder."""
    return [word.replace("$(id -u):$(id -g)", "12345:12345").replace("$PWD", str(folder)) for word in words]


def test_the_demo_trains_for_any_user_without_network_home_or_writable_files(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    command = store.inspect()["config"]["Cmd"]  # what the line without a command runs; here it ends sooner
    without_home = ["--env=HOME=/nowhere", "--read-only-tmpfs=false"]  # podman's, which would make /tmp writable
    ended = store.run(*without_home, *STRANGER, *command, *CUT)
    assert ended.code == 0, ended.output[-3000:]
    assert "cpu: selective_scan, causal_conv;" in ended.output and "building the C++" not in ended.output
    assert re.search(r"step +3 .*validation", ended.output) and "\nresult " in ended.output
    ours = re.sub(r"(?m)^\[20.*\n", "", ended.output.partition("\nresult ")[0])  # not the launcher's log
    assert not re.search(r"(?i)warning|traceback|error|cannot", ours), ours
    started = store.run(*DEMO, "python", "-c", "pass")
    imported = store.run(*DEMO, "python", "-c", "import moe_mamba.train.trainer")
    with capsys.disabled():
        print(f"\nimage of {store.size() / 1e9:.2f} GB; starts in {started.seconds:.1f} s, with all libraries in")
        print(f"{imported.seconds:.1f} s; the demo's first 3 steps end after {ended.seconds:.1f} s")


def test_what_the_image_says_of_itself(store: Store) -> None:
    config = store.inspect()["config"]
    assert (config["Entrypoint"], config["Cmd"], config["User"]) == (
        ["tini", "--", "python", "/workspace/docker/start.py"],
        ["deepspeed", "launch/train.py"],
        "1000:1000",
    )
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "docker/healthcheck.py"]
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"


def test_it_holds_no_more_than_it_needs(store: Store) -> None:
    shown = "ls -a . moe_mamba/kernels/prebuilt; find /wheels /etc/pip.conf -size +0; command -v c++ g++ gcc cc"
    ended = store.run(*DEMO, "sh", "-c", shown)
    assert not set(ended.output.split()) & {"tests", "docs", ".git"}, ended.output
    assert not re.search(r"(?m)^/", ended.output), ended.output  # no compiler, no configuration of this machine's
    assert ended.output.count("moe_mamba_kernels-") == 2, ended.output


def test_a_run_in_a_mounted_folder_goes_on_and_another_user_is_refused(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o755)
    first = type_line(MOUNTED, tmp_path)
    refused = store.run(*first, *CUT)
    assert refused.code == 2 and "Traceback" not in refused.output, refused.output
    os.chown(runs, 12345, 12345)
    assert store.run(*first, *CUT).code == 0
    again = store.run(*first, *CUT, "--train.steps=5")
    assert again.code == 0, again.output[-3000:]
    steps = [json.loads(line).get("step") for line in (runs / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert 5 in steps and steps.count(2) == 1
    written = store.run(*type_line(GENERATE, tmp_path))
    assert written.code == 0 and "The " in written.output, written.output
    healthy = store.run(*type_line(MOUNTED, tmp_path)[:-3], "python", "docker/healthcheck.py")
    assert healthy.code == 0, healthy.output
