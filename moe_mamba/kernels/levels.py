"""Levels of processors: named sets of instructions that a library is built for, and which of them this machine has.

A library built for the machine at hand (``native``) may stop with an illegal instruction on another. One that goes into
an image, or into a folder that many machines share, is built once per level; each machine loads the best that it has.
"""

import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Level:
    """A set of instructions.

    Attributes:
        name: what compilers call it, after ``-march=``.
        machine: what ``platform.machine`` calls the architecture.
        needs: the flags that Linux reports of every processor that has it.
    """

    name: str
    machine: str
    needs: frozenset[str]


_V2 = frozenset(["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# The best of an architecture first. AMX is no level: it multiplies matrices, and these kernels multiply none. Nor is a
# later ARM: on fp32 and fp64, in vectors of 16 bytes, it has the same instructions.
LEVELS = (
    Level("x86-64-v4", "x86_64", _V4),  # AVX-512: servers from Skylake and Zen 4 on
    Level("x86-64-v3", "x86_64", _V3),  # AVX2 and FMA: from Haswell and Zen on
    Level("armv8-a", "aarch64", frozenset(("asimd", "fp"))),  # NEON: every 64-bit ARM
)


def levels_of(machine: str) -> list[Level]:
    """Those of an architecture, the best first."""
    return [level for level in LEVELS if level.machine == machine]


def best_level(levels: Collection[Level], machine: str, flags: Collection[str]) -> Level | None:
    """The best of these levels that a processor has; None: it has none of them."""
    return next((one for one in levels_of(machine) if one in levels and one.needs <= set(flags)), None)


def processor_flags() -> frozenset[str]:
    """The sets of instructions of this machine that its system lets programs use; empty where it is not Linux."""
    return frozenset(_of_processor("flags|Features").split())


def processor_vendor() -> str:
    """Who made this x86 processor, as it says itself, such as ``AuthenticAMD``; empty on others and without Linux."""
    return _of_processor("vendor_id")


def processor_name() -> str:
    """What this processor calls itself, such as ``AMD EPYC``; its architecture where it does not say."""
    return _of_processor("model name") or platform.machine()


def _of_processor(names: str) -> str:
    """What Linux says of the first processor under one of these names; empty: nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^(?:{names})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
