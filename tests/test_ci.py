"""What runs before a commit, and on every change, is one list."""

import yaml

from tests import ROOT

CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_hook_is_a_step_of_the_ci() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    steps = [line.split('"')[-2] for line in CI.splitlines() if line.startswith("step ")]
    assert steps[1:] == entries  # the first is the training run


def test_the_ci_runs_the_readmes_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("train", "test"):
        (command,) = (line.partition("=")[2].strip('"') for line in CI.splitlines() if line.startswith(f"{name}="))
        assert command in readme
