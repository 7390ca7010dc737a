"""Whether the training in this container works: the exit code is for HEALTHCHECK, and the line for ``docker inspect``.

A run writes ``heartbeats/<host name>`` in its folder every few seconds, as long as its main thread works. Files older
than this container are of another one with the same name. Without any there is nothing to complain of: a training that
has not begun, or something else than a training.
"""

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import psutil

LIMIT = 180.0  # seconds without a sign of life


def main() -> int:
    """Look for this host's newest heartbeat in the folders of runs below MOE_MAMBA_RUNS."""
    runs = Path(os.environ.get("MOE_MAMBA_RUNS", "runs"))
    name = f"heartbeats/{socket.gethostname()}"
    found = []
    for pattern in ("", "*/", "*/*/"):
        for path in runs.glob(pattern + name):
            with contextlib.suppress(OSError):  # replaced, or gone, since it was listed
                found.append(path.stat().st_mtime)
    newest = max(found, default=0.0)
    if newest < psutil.Process(1).create_time():
        print(f"no training has begun below {runs}")
        return 0
    age = time.time() - newest
    print(f"last sign of life {age:.0f} s ago")
    return int(age > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
