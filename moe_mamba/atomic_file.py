"""Files that are there whole or not at all, whenever a process is killed or the power goes.

A file is written under a temporary name beside its own, brought to the disk, renamed, and its folder's entries are
brought to the disk: each step only once the one before it is done, as rename(2) and fsync(2) want it. The package knows
no other way to replace a file.
"""

import errno
import os
import secrets
from pathlib import Path

NOT_FOR_FOLDERS = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP}  # what fsync of a folder may answer
TEMPORARY = ".tmp"  # how temporary names end; those of `write_atomically` begin with a dot


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, or make it: whoever reads it meanwhile, or after a kill, finds the old or the new content whole.

    Several processes may write the same file at once: the last one stays.

    Args:
        path: the file, in a folder that exists.
        content: bytes, or text, which is written as UTF-8.

    Raises:
        OSError: it cannot be written; the old content stays, unless only the folder could not be brought to the disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    stream = temporary.open("xb")
    try:
        with stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file beside `path` that name, once its content is on the disk."""
    synchronize(temporary)
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Rename a file, in place of another one or of none, or a folder, for good: a power cut does not take it back.

    The content is another matter: see `put_in_place`, and `synchronize_tree` for a folder.
    """
    try:
        os.replace(source, target)
    except IsADirectoryError as error:  # name what is in the way, not the file with a name of its own beside it
        raise IsADirectoryError(error.errno, error.strerror, str(target)) from error
    synchronize(target.parent)


def synchronize(path: Path) -> None:
    """Wait until a closed file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do that for a folder, and say so (PostgreSQL's fsync_fname takes it the same way).
        if error.errno not in NOT_FOR_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def synchronize_tree(folder: Path) -> None:
    """Wait until all that a folder holds is on the disk."""
    for path in (*folder.rglob("*"), folder):
        synchronize(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder, in which no other process is at work."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink()
