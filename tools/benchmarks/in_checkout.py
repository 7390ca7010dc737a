"""What ``before.py`` starts in a process of its own, with the code of one checkout or of another: imports nothing else.

    python in_checkout.py ORDERS ANSWERS train --section.key=value ...      a step of training an order
    python in_checkout.py ORDERS ANSWERS generate WIDTH PAIRS TOKENS DTYPE  a text of so many tokens an order

``PYTHONPATH`` says whose ``moe_mamba`` it is; only what all its versions have is used. ORDERS and ANSWERS are
descriptors of pipes. An order is a line; the answer to it two numbers: CPU milliseconds of all threads since the order
(the first: since the process began), and the most memory that the process ever had, in MiB.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """Whose turn it is: work is done between an order and its answer."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders = os.fdopen(orders, encoding="utf-8")
        self._answers = os.fdopen(answers, "w", encoding="utf-8")
        self._begun = 0.0
        self._wait()

    def done(self) -> None:
        """Answer, and wait for the next order."""
        used = 1e3 * (time.process_time() - self._begun)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(used, peak, file=self._answers, flush=True)
        self._wait()
        self._begun = time.process_time()

    def _wait(self) -> None:
        if not self._orders.readline():
            os._exit(0)  # whoever gave the orders has enough


def train(turns: Turns, arguments: list[str]) -> None:
    """Train as ``launch/train.py`` does; a turn is over when a step's line of metrics is written."""
    from moe_mamba.command_line import run_command
    from moe_mamba.commands.train import main
    from moe_mamba.run.metrics import MetricsWriter

    write = MetricsWriter.write

    def write_and_wait(self: MetricsWriter, line: dict[str, Any]) -> None:
        write(self, line)
        turns.done()

    MetricsWriter.write = write_and_wait  # type: ignore[method-assign]
    sys.argv = ["launch/train.py", *arguments]
    run_command(main)


def generate(turns: Turns, arguments: list[str]) -> None:
    """Write a text with a model of random weights, again and again; the first turn makes the model."""
    from moe_mamba.config import ModelConfig, MoEConfig
    from moe_mamba.model.generation import generate as write
    from moe_mamba.model.initialize import initialize
    from moe_mamba.model.language_model import LanguageModel

    width, pairs, tokens = map(int, arguments[:3])
    config = ModelConfig(pattern="ME", repeat=pairs, d_model=width, d_ff=2 * width, vocab_size=512, activation="swiglu")
    model = LanguageModel(config, MoEConfig(experts=8, router="top_k", capacity_factor=None, balance="none"))
    initialize(model, seed=0)
    if arguments[3] == "bf16":
        from moe_mamba.parallel.parallelize import cast_to_bf16

        cast_to_bf16(model)
    while True:
        turns.done()
        assert len(list(write(model, [1, 2, 3, 4], tokens, temperature=0))) == tokens


WORK: dict[str, Callable[[Turns, list[str]], None]] = {"train": train, "generate": generate}

if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose modules have short names
    orders, answers, work, *rest = sys.argv[1:]
    WORK[work](Turns(int(orders), int(answers)), rest)
