"""Three machines on one: namespaces with addresses, host names, hosts files, shared memory and sshd of their own.

All of them live in one namespace of processes, whose first process dies with pytest, however that ends; the kernel
then ends every process in it, and removes their links and mounts. Nothing of it has a name outside: sessions cannot
meet, and nothing is left over. The file system is shared, as a cluster's is; what a machine shall have for itself is
mounted there.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import ROOT

NAMES = ("node1", "node2", "node3")
PROGRAMS = ("ip", "ss", "nsenter", "unshare", "setpriv", "ssh", "ssh-keygen", "sshd", "pdsh")
# An anchor holds a namespace: a process that does nothing. The first one of a process namespace inherits orphans, and
# leaves no zombies by ignoring their ends.
ANCHOR = """
trap "" CHLD
{}
echo ready
exec sleep infinity
"""
SITE = """
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs -o size=64m none "$1/disk"
"""
MACHINE = """
hostname "$2"
mount --bind "$1/hosts-$2" /etc/hosts
mount -t tmpfs none /dev/shm
ip link set lo up
"""
SWITCH = """
ip link add bridge type bridge
ip link set bridge up
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


def missing() -> str | None:
    """What this machine lacks to hold others; None: nothing."""
    if os.geteuid() != 0:
        return "root"
    if lacking := [name for name in PROGRAMS if program(name) is None]:
        return ", ".join(lacking)
    try_it = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    return None if subprocess.run(try_it, capture_output=True).returncode == 0 else "the right to make namespaces"


def skip_where_impossible() -> None:
    """Skip a test of several machines, all of them with one line."""
    if lacking := missing():
        pytest.skip(f"three machines on one need {lacking}")


def program(name: str) -> str | None:
    """Path of a program, some of which are only for root's eyes."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def wait(condition: Callable[[], Any], seconds: float, what: str = "it") -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} is not there after {seconds} s"
        time.sleep(0.05)


def shell(*command: object) -> str:
    """What a command prints that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Anchor:
    """A process that holds namespaces; `process` is its number outside, `inner` its number among the machines'."""

    def __init__(self, *command: str, script: str, arguments: tuple[object, ...] = ()) -> None:
        words = [*command, "sh", "-ec", ANCHOR.format(script), "sh", *map(str, arguments)]
        pipe = subprocess.PIPE
        self._starter = subprocess.Popen(words, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True)
        assert self._starter.stdout is not None
        if self._starter.stdout.readline() != "ready\n":
            raise OSError(f"{words}: {self._starter.communicate()[1]}")
        self.process = psutil.Process(self._starter.pid).children()[0].pid
        self.inner = Path(f"/proc/{self.process}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()[-1]

    def end(self) -> None:
        """End it, and wait until the kernel has ended what its namespace of processes holds."""
        os.kill(self.process, signal.SIGKILL)
        self._starter.communicate()


class Machine:
    """One machine: commands run in it, and its link is cut and restored from outside.

    Attributes:
        name: its host name.
        address: on the one network of all machines.
        disk: a small disk that all machines share, 64 MB.
        inner: the number of a process in it, for ``nsenter`` on another machine.
    """

    def __init__(self, site: "Site", number: int, name: str) -> None:
        self.name, self.address = name, f"10.77.0.{number}"
        self.disk = site.disk
        self._site, self._port = site, f"port{number}"
        self.hosts = site.folder / f"hosts-{name}"
        self.hosts.write_text(site.hosts)
        self._anchor = site.anchor("--net", "--uts", "--mount", script=MACHINE, arguments=(site.folder, name))
        self.inner = self._anchor.inner
        link = "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self._anchor.process
        site.switch(*link)
        site.switch("link", "set", self._port, "master", "bridge", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        config = site.folder / f"sshd-{name}"
        config.write_text(SSHD.format(folder=site.folder, address=self.address))
        self.run(program("sshd"), "-f", config)

    def command(self, *command: object, folder: Path = ROOT) -> list[str]:
        """The words that run a command here from outside."""
        enter = ["nsenter", f"--target={self._anchor.process}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, "--", "env", "-C", str(folder), *map(str, command)]

    def run(self, *command: object) -> str:
        """What a command prints here that must succeed."""
        return shell(*self.command(*command))

    def start(self, *command: object, screen: Path, folder: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command here, in `folder`, that writes to the file `screen`."""
        everything = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        with screen.open("wb") as output:
            return subprocess.Popen(
                self.command(*command, folder=folder),
                env=everything, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def cut(self) -> None:
        """Cut its link: what was sent to it, and by it, is lost."""
        self._site.switch("link", "set", self._port, "down")

    def reconnect(self) -> None:
        """Restore its link."""
        self._site.switch("link", "set", self._port, "up")

    def own(self, folder: Path) -> None:
        """Give it an empty folder of its own in this place."""
        self.run("mount", "-t", "tmpfs", "none", folder)

    def seen(self, path: Path) -> Path:
        """What it has at `path`, for a process outside."""
        return Path(f"/proc/{self._anchor.process}/root{path}")

    def listens(self, port: int) -> bool:
        """Whether a process listens at a port."""
        return bool(self.run("ss", "-Hltn", f"sport = :{port}"))


class Site(contextlib.AbstractContextManager["Site"]):
    """The machines, the switch between them, and keys with which each may log in to all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        self.disk.mkdir()
        addresses = [f"10.77.0.{number} {name}\n" for number, name in enumerate(NAMES, 1)]
        self.hosts = "".join(["127.0.0.1 localhost\n", *addresses])
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        for key in ("key", "host_key"):
            shell("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        apart = ("unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
        self._first = Anchor("setpriv", "--pdeathsig", "KILL", *apart, script=SITE, arguments=(folder,))
        self._inside = ("nsenter", f"--target={self._first.process}", "--mount", "--pid")
        self.forget(Path(pwd.getpwuid(0).pw_dir, ".ssh"))
        self._switch = self.anchor("--net", script=SWITCH)
        self.machines = [Machine(self, number, name) for number, name in enumerate(NAMES, 1)]
        wait(lambda: all(machine.listens(22) for machine in self.machines), 10, "sshd")

    def anchor(self, *apart: str, script: str, arguments: tuple[object, ...] = ()) -> Anchor:
        """Hold namespaces of the kinds `apart` among the machines."""
        return Anchor(*self._inside, "unshare", *apart, script=script, arguments=arguments)

    def switch(self, *words: object) -> None:
        """Run ``ip`` in the switch between the machines."""
        shell("nsenter", f"--target={self._switch.process}", "--net", program("ip"), *words)

    def forget(self, folder: Path) -> None:
        """Hide from all machines what this one has in a folder."""
        if folder.is_dir():
            shell(*self._inside, "mount", "-t", "tmpfs", "none", folder)

    def __exit__(self, *_: object) -> None:
        """End every process, and wait until none is left."""
        self._first.end()


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    """Three machines, fresh for each test."""
    skip_where_impossible()
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site.machines
