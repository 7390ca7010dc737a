"""A folder that a command writes: it appears when it is whole, and takes the place of another one when asked to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_mamba.atomic_file import rename, synchronize_tree
from moe_mamba.errors import UserError


def check_output(output: Path, overwrite: bool, mark: str, source: str | Path | None = None) -> None:
    """Refuse an output that would lose something, before any work is done.

    Args:
        output: the folder to write.
        overwrite: a folder that holds ``mark`` may be replaced.
        mark: a file that such folders hold.
        source: what is read, which the output must not take the place of.

    Raises:
        UserError: it is a file, the working folder or one above it, or a folder that is not empty (with ``overwrite``:
            and holds no ``mark``, or holds ``source``).
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"--output={output} is not a folder: give another name")
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(f"--output={output} holds the working folder, which cannot be replaced: give another folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output={output} is not empty: give another folder, or --overwrite to replace it")
    if not (output / mark).is_file():
        raise UserError(f"--output={output} holds no {mark}, so --overwrite does not replace it: give another folder")
    if source is not None and Path(source).resolve().is_relative_to(output.resolve()):
        raise UserError(f"--output={output} holds {source}, which is an input: give another folder")


@contextmanager
def whole_folder(output: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """A folder beside ``output`` to write into; it takes that name when the block ends well, and else is removed.

    What a killed command left behind is cleared by the next one: nothing that had the name is lost.

    Raises:
        UserError: as ``check_output``; or the disk fails.
    """
    output = Path(os.path.abspath(output))  # so that it has a name, whatever it was written as
    aside, replaced = (output.with_name(f".{output.name}.{end}") for end in ("partial", "replaced"))
    try:
        if replaced.exists() and not output.exists():  # a kill came between the two renames
            rename(replaced, output)
        check_output(output, overwrite, mark)
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        synchronize_tree(aside)
        if output.exists():
            rename(output, replaced)
        rename(aside, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error}): fix this, or give another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
