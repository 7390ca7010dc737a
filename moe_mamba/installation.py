"""Where the package lies, in a checkout or installed from a wheel: what its configurations and commands are called."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent  # of a wheel: site-packages
# A wheel carries them inside the package (setup.py); a checkout has them beside it.
CONFIGS = next(folder for folder in (PACKAGE / "configs", CHECKOUT / "configs") if folder.is_dir())


def find_config(path: Path) -> Path:
    """`path`; or, where it is no file and begins with ``configs/``, the configuration of that name that we ship."""
    if path.exists() or path.parts[:1] != (CONFIGS.name,):
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path


def command(name: str) -> str:
    """How a line begins that runs a command: ``python tools/plan.py`` in a checkout, else ``moe-mamba plan``."""
    script = f"launch/{name}.py" if name in ("train", "preflight") else f"tools/{name}.py"
    return f"python {script}" if (CHECKOUT / script).is_file() else f"moe-mamba {name}"
