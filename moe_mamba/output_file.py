"""Files that a command writes its answer to: looked at before the work, written once the answer is on the screen."""

import tempfile
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.errors import LocalError, UserError, shown


def output(name: str, endings: str | tuple[str, ...], flag: str) -> Path:
    """A file that can be written, by its name; where a link leads, if it is one.

    Args:
        name: as the user gave it.
        endings: that it may have.
        flag: that it was given with.

    Raises:
        UserError: it has another ending, is no file, or lies where nothing can be written.
    """
    said = f"{flag}={shown(name)[1:-1]}"
    if not name.endswith(endings):
        wanted = endings if isinstance(endings, str) else ", ".join(endings)
        raise UserError(f"{said}: give a file that ends in {wanted}")
    path = Path(name).expanduser()
    if not path.absolute().parent.is_dir():
        raise UserError(f"{said}: there is no folder {shown(str(path.parent))}: make it first")
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            raise UserError(f"{said} is there and is no file: give another name")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{said} cannot be written ({error.strerror}): give another file") from None
    return path


def save(path: Path, content: str | bytes) -> None:
    """Replace a file, or make it.

    Raises:
        LocalError: it cannot be written, as where the disk is full.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise LocalError(f"{path} cannot be written ({error.strerror}): free the disk, or give another file") from None
