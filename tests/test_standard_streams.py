"""Every command on streams that are closed, full, without a reader, or of another encoding: no traceback, one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py")),
    *("launch/train.py", "launch/preflight.py", "-m moe_mamba"),
]
C_LOCALE = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
# name -> the shell's line, exit codes, what standard error begins with
STREAMS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "-h": ("{tool} -h", (0,), ""),
    "ascii": ("PYTHONIOENCODING=ascii {tool} --nonsénse=é", (2,), "error: "),
    "latin": ("PYTHONIOENCODING=latin-1 {tool} --nonsense=日本", (2,), "error: "),
    "bytes": ("{tool} $'--nonsense=\\xff'", (2,), "error: "),
    "locale": (C_LOCALE + " {tool} --nonsense=é", (2,), "error: "),
    "no reader": ("{tool} --help | true; exit ${{PIPESTATUS[0]}}", (141, 0), ""),
    "no output": ("{tool} --help >&-", (0,), ""),
    "no error": ("{tool} --nonsense=1 2>&-", (2,), ""),
    "nothing": ("{tool} --help <&- >&- 2>&-", (0,), ""),
    "full": ("{tool} --help >/dev/full", (1,), "error: standard output cannot be written"),
}


def shell(line: str, tool: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    line = line.format(tool=f"{sys.executable} {tool if tool.startswith('-') else ROOT / tool}")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, timeout=120)


def check(tool: str, stream: str, folder: Path) -> None:
    line, codes, begins = STREAMS[stream]
    done = shell(line, tool, folder)
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    assert done.returncode in codes, (tool, stream, done)
    assert len(lines) == (begins != "") and all(line.startswith(begins) and len(line) <= 300 for line in lines), done


@pytest.mark.parametrize("stream", STREAMS)
def test_training_on_any_streams(tmp_path: Path, stream: str) -> None:
    check("launch/train.py", stream, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(TOOLS)), ids=TOOLS)
def test_every_tool_on_some_streams(tmp_path: Path, place: int) -> None:
    names = list(STREAMS)
    for number in range(2):  # each stream meets some tools, and each tool some streams
        check(TOOLS[place], names[(2 * place + number) % len(names)], tmp_path)


def test_a_file_is_not_printed_into_where_output_is_closed(tmp_path: Path) -> None:
    code = (
        "from moe_mamba.standard_streams import standard_streams as streams\nwith streams(): open('f', 'w'); print('x')"
    )
    (tmp_path / "code.py").write_text(code)
    done = shell("{tool} >&- 2>&- <&-", str(tmp_path / "code.py"), tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "f").read_text() == ""


def test_what_is_printed_in_letters_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    code = "from moe_mamba.command_line import run_command\ndef main(): print('é日')\nrun_command(main)"
    (tmp_path / "code.py").write_text(code)
    done = shell("PYTHONIOENCODING=latin-1 {tool}", str(tmp_path / "code.py"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\xe9\\u65e5\n", b"")
