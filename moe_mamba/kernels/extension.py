"""Our C++ kernels (``csrc/``): libraries built for a level of processors, where there are; else built on first use.

The sources do not include torch: they build in seconds, and ctypes calls them with raw pointers and without Python's
lock. Libraries for levels (``levels.py``) lie in a folder, as in an image, and need no compiler. What is built on first
use, by torch's extension builder and for this very CPU, lies in the user's cache under everything that its code depends
on (sources, flags, compiler, CPU, torch), so that neither a stale one nor one of another machine with the same home is
ever loaded. It is built in a folder of its own, by a process of its own, and moved to its place whole: whoever is
killed meanwhile, nothing is left that a later run trips over. Of many processes that start at once one builds, and the
others wait.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_mamba.atomic_file import put_in_place
from moe_mamba.errors import UserError
from moe_mamba.file_lock import lock
from moe_mamba.kernels.levels import LEVELS, Level, best_level, processor_flags

SOURCES = Path(__file__).parent / "csrc"
NAME = "moe_mamba_kernels"
FOLDER = "MOE_MAMBA_KERNELS"  # environment variable: where libraries for levels lie, if not inside the package
PATIENCE = 300.0  # seconds that a compiler, and another process that builds, is waited for
# -O3 builds three times as long and runs no faster: loops are vectors already. No -ffast-math: NaN and infinity stay.
FLAGS = ("-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")
_BUILDER = """
import sys
from torch.utils.cpp_extension import load
name, folder, flags, links, *sources = sys.argv[1:]
load(name, sources, flags.split(), extra_ldflags=links.split(), build_directory=folder, is_python_module=False)
"""


TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Type in C++


class Strided(ctypes.Structure):
    """``Tensor`` in C++: (batch, steps, channels) or one step, channels side by side; strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("step_stride", ctypes.c_int64))


class _BuildError(Exception):
    """Why there is no library, in one line with the fix."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_announce: Callable[[str], None] = _to_stderr


def announce_by(say: Callable[[str], None]) -> None:
    """Have ``say`` tell the user that a build begins, where standard error is not what the user sees."""
    global _announce
    _announce = say


@cache
def build() -> str | None:
    """Build the library or load it; gives the reason why that is not possible here, and the fix."""
    try:
        library()
    except _BuildError as error:
        return str(error)
    except OSError as error:
        return f"no folder for the C++ kernels can be written ({error.strerror}): set XDG_CACHE_HOME to one that can"
    return None


def fill(arguments: ctypes.Structure, tensors: dict[str, Tensor | None]) -> Any:
    """Point the fields of these names to the tensors, which must outlive the call; None leaves null.

    Returns:
        The arguments by reference, for a function of the library.
    """
    for field in arguments._fields_:
        name, tensor = field[0], tensors.get(field[0])
        if tensor is None:
            continue
        if field[1] is Strided:
            setattr(arguments, name, Strided(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))
        else:
            setattr(arguments, name, tensor.data_ptr())
    return ctypes.byref(arguments)


def rows(tensor: Tensor | None) -> tuple[int | None, int, int]:
    """What ``Strided`` takes to point to (batch, channels), which must outlive the call; None leaves null."""
    return (None, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), 0)


def sum_in_order(partial: Tensor, dimension: int) -> Tensor:
    """Sum over a dimension, one entry after the other, whatever the number of threads."""
    return reduce(torch.add, partial.unbind(dimension))


@cache
def library() -> ctypes.CDLL:
    """The library, for those who know that ``build`` gave None."""
    loaded, why_not = _load_prebuilt()
    if loaded is not None:
        return loaded
    try:
        loaded = _load_local()
    except _BuildError as error:
        raise _BuildError(f"{why_not}; {error}" if why_not else str(error)) from error
    if why_not:
        _announce(f"{why_not}: those built on this machine serve instead")
    return loaded


def build_for(level: Level, folder: Path) -> Path:
    """Build the library for a level of this architecture, with the compiler of CXX, into a folder that exists.

    Raises:
        UserError: there is no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    path = folder / _file_name(level)
    own = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        put_in_place(_compile(own, f"-march={level.name}", folder / f"{level.name}.log"), path)
    except _BuildError as error:
        raise UserError(str(error)) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return path


def _file_name(level: Level) -> str:
    """Of the library for a level: one that was built from other sources is never taken for it."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    _add_sources(digest)
    return f"{NAME}-{level.name}-{digest.hexdigest()[:16]}.so"


def _load_prebuilt() -> tuple[ctypes.CDLL | None, str]:
    """The best library of the folder for this processor; or why there is none, empty where there is no such folder."""
    folder = Path(os.environ.get(FOLDER) or Path(__file__).parent / "prebuilt")
    if not os.environ.get(FOLDER) and not folder.is_dir():
        return None, ""
    there = [level for level in LEVELS if (folder / _file_name(level)).exists()]
    best = best_level(there, platform.machine(), processor_flags())
    if best is not None:
        try:
            return ctypes.CDLL(str(folder / _file_name(best))), ""
        except OSError as error:
            return None, f"the C++ kernels in {folder} cannot be loaded ({error})"
    if not there:
        return None, f"{folder} holds no C++ kernels of these sources: python tools/build_kernels.py --output={folder}"
    names = ", ".join(level.name for level in there)
    return None, f"the C++ kernels in {folder} are for {names}, which this processor is not"


def _load_local() -> ctypes.CDLL:
    """The library for this CPU alone, from the user's cache, or built."""
    key = _key(shlex.split(os.environ.get("CXX", "c++")))  # the compiler that torch's builder takes
    with contextlib.suppress(RuntimeError):  # no home folder
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_mamba" / "kernels"
        try:
            return _cached(root / key)
        except OSError as error:
            why = f"{root} cannot keep the C++ kernels ({error.strerror})"
            _announce(f"{why}: building them for only this process")
    folder = Path(tempfile.mkdtemp(prefix="moe_mamba-"))
    loaded = ctypes.CDLL(str(_compile(folder, _native())))
    shutil.rmtree(folder, ignore_errors=True)
    return loaded


def _key(compiler: list[str]) -> str:
    """Name of the folder for what this compiler makes of our sources on this machine."""
    try:
        answer = subprocess.run([*compiler, "--version"], capture_output=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        tried = " ".join(compiler)
        raise _BuildError(f"no C++ compiler was found ({tried}): install g++, or name one in CXX") from error
    flags = map(" ".join, _flags(_native()))
    parts = [*compiler, answer.stdout.decode(errors="replace"), *flags, torch.__version__, _cpu()]
    digest = hashlib.sha256("\0".join(parts).encode())
    _add_sources(digest)
    return digest.hexdigest()[:24]


def _add_sources(digest: "hashlib._Hash") -> None:
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())


def _native() -> str:
    """The flag that builds for this CPU."""
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _flags(processor: str) -> tuple[list[str], list[str]]:
    """Those of the compiler, with the one that names the processor, and those of the linker."""
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has no OpenMP
    return [*FLAGS, processor, *threads], threads


def _cpu() -> str:
    """What tells this CPU from others that ``native`` would mean something else on."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.machine() + platform.processor()
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
    return "\n".join(line for line in first.splitlines() if line.startswith(keys))


def _cached(folder: Path) -> ctypes.CDLL:
    """The library of this folder, built where it is not there yet, or truncated."""
    path = folder / f"{NAME}.so"
    begin = time.time()
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
        log = folder / "build.log"
        if log.exists() and log.stat().st_mtime > begin:  # the one that we waited for has failed
            raise _failure(log)
        for left in folder.glob("build-*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        _announce(f"building the C++ kernels (once, a few seconds): {folder}")
        try:
            put_in_place(_compile(own, _native(), log), path)
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return ctypes.CDLL(str(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that dies with its holder."""
    end = time.monotonic() + 2 * PATIENCE
    with open(path, "w") as file:
        while True:
            try:
                lock(file.fileno())  # without locks, several may build: each in a folder of its own
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise _BuildError(f"another process holds {path} and does not end: stop it") from None
                time.sleep(0.05)
        yield


def _compile(folder: Path, processor: str, log: Path | None = None) -> Path:
    """Build the library in an empty folder, for the processor that a flag names."""
    log = log or folder / "build.log"
    compiling, linking = _flags(processor)
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    arguments = [NAME, str(folder), " ".join(compiling), " ".join(linking), *sources]
    # ninja comes with DeepSpeed, beside Python's executable, which is on the path of an activated environment only
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BUILDER, *arguments],
            env={**os.environ, "PATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise _BuildError(f"the C++ compiler did not end within {PATIENCE:.0f} s, log at {log}") from None
        finally:
            if process.poll() is None:
                _stop(process)
    if code != 0:
        raise _failure(log)
    log.unlink()
    return folder / f"{NAME}.so"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a leader of a session with everything that it started; ninja, when asked to end, ends the compilers."""
    end = time.monotonic() + 2
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)  # raises when none is left
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(log: Path) -> _BuildError:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it was killed"]
    telling = next((line for line in lines if "error:" in line), lines[-1])
    return _BuildError(f"the C++ compiler failed: {telling.strip()}, log at {log}")
