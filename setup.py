"""What pyproject.toml cannot say: a wheel carries configs/, which stands beside the package, inside it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the package and its configurations; an editable installation finds the latter in the checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", str(Path(self.build_lib, "moe_mamba", "configs")))


setup(cmdclass={"build_py": BuildWithConfigs})
