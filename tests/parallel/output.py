"""What a command prints, on one of many ranks."""

import contextlib
import io
from importlib import import_module
from typing import Any


def printed(command: str, *arguments: Any, **flags: Any) -> str:
    """In a worker: what ``moe-mamba command`` writes on standard output on this rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        import_module(f"moe_mamba.commands.{command}").main(*arguments, **flags)
    return output.getvalue()
