"""Write the two files that Transformers loads from the package's source."""

from moe_mamba.command_line import run_command
from moe_mamba.errors import UserError
from moe_mamba.hf.assemble import PACKAGE, assemble


def main(check: bool = False) -> None:
    """Assemble ``configuration_moe_mamba.py`` and ``modeling_moe_mamba.py`` in moe_mamba/hf.

    Args:
        check: write nothing, and fail where a file is not what would be written.
    """
    for name, text in assemble().items():
        path = PACKAGE / "hf" / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} is stale: run python tools/assemble_hf.py")


if __name__ == "__main__":
    run_command(main)
