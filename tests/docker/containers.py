"""Images without Docker: buildah builds them, podman runs them, in a store of the test's own.

Neither needs a daemon. The base is Debian by debootstrap, because tests reach no registry of images; what pip and apt
need of this machine (indices, certificates) is mounted for the build alone, and enters no image.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

PROGRAMS = ("buildah", "podman", "crun", "debootstrap", "unshare")
BASE, IMAGE = "localhost/base", "localhost/moe_mamba:cpu"
# podman wants version 2 of control groups, and limits that only a more powerful root may raise.
RUN = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"'
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--cgroups=disabled", "--no-healthcheck")


class Ended(NamedTuple):
    """A container's end."""

    code: int
    output: str
    seconds: float


def what_is_missing() -> str | None:
    """Why no image can be built here, in one line."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install {' '.join(PROGRAMS[:-1])}"
    return None if os.geteuid() == 0 else "images are built by root"


class Store:
    """Images and containers of one test run, in a folder that `remove` leaves nothing of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.options = [f"--root={self.images}", f"--runroot={folder / 'state'}"]
        probe = subprocess.run(["buildah", *self.options, "--storage-driver=overlay", "info"], capture_output=True)
        self.options += [f"--storage-driver={'vfs' if probe.returncode else 'overlay'}"]

    def buildah(self, *words: str) -> str:
        """Call buildah; gives what it prints.

        Raises:
            AssertionError: it failed, with the end of what it said.
        """
        command = ["buildah", *self.options, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout.strip()

    def make_base(self) -> None:
        """Debian with its Python, as ``BASE``."""
        tree = self.folder / "base"
        included = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", included, "bookworm", str(tree)], check=True, capture_output=True
        )
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, str(tree), "/")
        self.buildah("commit", "--quiet", container, BASE)
        self.buildah("rm", container)
        shutil.rmtree(tree)

    def build(self, words: Sequence[str], *options: str) -> None:
        """``docker build WORDS``, upon ``BASE``, with more options; buildah wants all of them before the folder."""
        mounts = [f"--volume={path}:{path}:ro" for path in _of_this_machine()]
        kind = ["--isolation=chroot", "--format=docker"]  # the other format knows no HEALTHCHECK
        self.buildah("bud", *kind, f"--build-arg=BASE={BASE}", *mounts, *options, *words)

    def inspect(self) -> dict:
        """The image's configuration, as Docker would show it."""
        return json.loads(self.buildah("inspect", "--type=image", IMAGE))["Docker"]

    def size(self) -> int:
        """Bytes of the image's files, its base included."""
        (image,) = json.loads(self.podman("image", "inspect", IMAGE))
        return image["Size"]

    def podman(self, *arguments: str) -> str:
        """Call podman; gives its standard output."""
        return subprocess.run(["podman", *self.options, *arguments], check=True, capture_output=True, text=True).stdout

    def run(self, *words: str) -> Ended:
        """``docker run WORDS``, without a network and with Docker's own 64 MB of shared memory."""
        # Docker makes no user where none is known: podman would
        command = [
            "podman",
            *self.options,
            "run",
            *(() if "--network" in words else ("--network=none",)),  # podman takes it once
            "--shm-size=64m",
            "--passwd=false",
            *LIMITS,
            *words,
        ]
        begin = time.monotonic()
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", RUN, "run", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return Ended(done.returncode, done.stdout, time.monotonic() - begin)

    def remove(self) -> None:
        """Remove all images, containers and volumes."""
        for arguments in (["rm", "--all", "--force"], ["volume", "rm", "--all", "--force"]):
            subprocess.run(["podman", *self.options, *arguments], capture_output=True)
        subprocess.run(["umount", str(self.images / "overlay")], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _of_this_machine() -> list[Path]:
    """Files and folders by which pip and apt find packages here."""
    paths = {Path(name) for name in ("/etc/apt", "/etc/ssl/certs", "/usr/share/ca-certificates")}
    paths.add(Path("/usr/local/share/ca-certificates"))
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        name, exists, _ = line.strip().partition(", exists: True")
        if exists:
            paths.add(Path(name).parent if Path(name).parent != Path("/etc") else Path(name))
    values = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for word in values.replace("'", " ").replace("\\n", " ").split():
        path = Path(word.removeprefix("file://").removesuffix("/simple"))
        if path.is_absolute():
            paths.add(path)
    return sorted(path for path in paths if path.exists())
