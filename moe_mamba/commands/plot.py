"""Draw the loss curves of one run or several in one picture."""

from collections import Counter
from pathlib import Path

from moe_mamba.errors import UserError
from moe_mamba.run.plots import plot_loss


def main(runs: str, output: str = "curves.png") -> None:
    """Draw training and validation loss over the tokens seen.

    Args:
        runs: folders of runs, with commas between them.
        output: the picture, PNG, SVG or PDF.
    """
    folders = [Path(run) for run in str(runs).split(",") if run]
    if not folders:
        raise UserError("--runs is empty: give folders of runs, such as --runs runs/a,runs/b")
    count = Counter(folder.name for folder in folders)
    plot_loss({folder.name if count[folder.name] == 1 else str(folder): folder for folder in folders}, output)
    print(output)
