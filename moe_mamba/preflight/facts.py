"""What a rank can tell of itself and its machine without asking another."""

import hashlib
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import warnings
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch

from moe_mamba.config import Config
from moe_mamba.installation import CHECKOUT, PACKAGE
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.levels import processor_name
from moe_mamba.model.pattern import kernel_operations
from moe_mamba.parallel.network import gloo_address, host_addresses
from moe_mamba.parallel.topology import World
from moe_mamba.preflight import network
from moe_mamba.preflight.report import DiskFacts, RankFacts
from moe_mamba.preflight.sources import source_facts

LIBRARIES = ("torch", "deepspeed", "megatron-core", "triton", "numpy")
SECONDS_FOR_GIT = 20


def rank_facts(config: Config, world: World, *, thorough: bool) -> RankFacts:
    """Collect them; `thorough`: builds and loads the kernels as well, which takes seconds."""
    addresses = host_addresses()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kernels = chosen_kernels(config, world) if thorough else None
    return RankFacts(
        rank=world.rank,
        local_rank=world.local_rank,
        machine=socket.gethostname(),
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        versions=versions(),
        revision=revision(),
        sources=hash_of_sources(PACKAGE),
        kernels=kernels,
        kernels_build=build_key() if kernels and "cpu" in kernels.values() else None,
        host_addresses=addresses,
        interfaces=network.interfaces(),
        asked_interfaces=network.asked_interfaces(),
        address=gloo_address(os.environ, addresses),
        route_interface=network.route_interface(),
        data=source_facts(config.data),
        disk=disk_facts(Path(config.run.folder)),
        shared_memory_bytes=shared_memory(),
        open_files=None if soft == resource.RLIM_INFINITY else soft,
        most_open_files=None if hard == resource.RLIM_INFINITY else hard,
        keepalive=ssh_keepalive() if world.local_size < world.size else "unused",
    )


def device_name(device: torch.device) -> str:
    """Its type and what it calls itself: ``cpu (AMD EPYC)``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{device.type} ({name})"


def versions() -> dict[str, str]:
    """Python and the libraries that a curve depends on, and those of CUDA; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = torch.__version__ if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def revision() -> str:
    """The checkout's commit, with ``(dirty)`` where tracked files differ from it; else the installed version."""
    if (CHECKOUT / ".git").exists():
        # In a container the checkout may belong to another user, which git refuses to look at unless told so.
        git = ["git", "-c", "safe.directory=*", "-C", str(CHECKOUT)]
        try:
            commit = _answer([*git, "rev-parse", "--short=12", "HEAD"]).strip()
            dirty = _answer([*git, "status", "--porcelain", "--untracked-files=no"]).strip()
            return f"{commit} (dirty)" if dirty else commit
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return metadata.version("moe_mamba")
    except metadata.PackageNotFoundError:
        return "unknown"


def hash_of_sources(package: Path) -> str:
    """Hash of the code that runs, wherever it comes from: it tells two dirty checkouts apart, and needs no git."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def chosen_kernels(config: Config, world: World) -> dict[str, str]:
    """Operation of a training step -> the back end that serves it here; builds or imports it."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a back end that is missing is a finding here
        return {
            operation: choose(operation, world.device.type, dtype, config.run.kernels, size)[0]
            for operation, size in kernel_operations(config.model, config.moe).items()
        }


def build_key() -> str:
    """Which build of the C++ kernels this process has loaded: its folder and name."""
    from moe_mamba.kernels.extension import library

    path = Path(library()._name)
    return f"{path.parent.name}/{path.name}"


def disk_facts(folder: Path) -> DiskFacts:
    """Space and checkpoints in the run's folder, which is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return DiskFacts(fault=f"{error.strerror}")
    return DiskFacts(free_bytes=free, checkpoints=len(list((folder / "checkpoints").glob("step-*"))))


def shared_memory() -> int | None:
    """Size of /dev/shm in bytes."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def ssh_keepalive() -> Literal["unused", "set", "missing", "unseen"]:
    """Whether the pdsh that ``deepspeed --hostfile`` started notices a machine that is gone.

    Only the launcher's machine has that process; its own variables do not come to the ranks.
    """
    if not _is_under_deepspeed():
        return "unused"
    launchers = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "pdsh"
        and any("deepspeed.launcher.launch" in word for word in process.info["cmdline"])
    ]
    try:
        environments = [process.environ() for process in launchers]
    except psutil.Error:  # another user's, or just gone
        return "unseen"
    if not environments:
        return "unseen"
    arguments = [shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", "")) for environment in environments]
    return "set" if all(map(_has_keepalive, arguments)) else "missing"


def _is_under_deepspeed() -> bool:
    """Whether DeepSpeed's launcher started this process."""
    try:
        return any("deepspeed.launcher.launch" in process.cmdline() for process in psutil.Process().parents())
    except psutil.Error:
        return False


def _has_keepalive(arguments: list[str]) -> bool:
    """Whether ssh, called with these, sends keep-alives; its own configuration files count as well."""
    try:
        settings = _answer(["ssh", "-G", *arguments, "localhost"])
    except (OSError, subprocess.SubprocessError):
        return "serveraliveinterval" in " ".join(arguments).lower()
    values = dict(line.split(" ", 1) for line in settings.lower().splitlines() if " " in line)
    return values.get("serveraliveinterval", "0") != "0"


def _answer(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(
        command,
        capture_output=True,
        check=True,
        text=True,
        timeout=SECONDS_FOR_GIT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    ).stdout
