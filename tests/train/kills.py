"""Kills of a process that does nothing but save."""

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_mamba.checkpoint import store
from tests.world import World


def kill_at_any_instant(world: World, folder: Path, save_for_ever: Callable[..., None], kills: int, words: int) -> int:
    """Kill a process again and again while it saves: what it had finished must be there, whole.

    Args:
        world: whose fork server starts it.
        folder: that it saves in.
        save_for_ever: called with a connection, the folder and the last step; saves three tensors full of the step's
            number, and sends the number of each step that is complete.
        kills: how many.
        words: how many numbers to wait for before a kill.

    Returns:
        The last step that is complete.
    """
    instants, step, finished = random.Random(0), 0, 0
    for _ in range(kills):
        here, there = world.context.Pipe()
        process = world.context.Process(target=save_for_ever, args=(there, folder, step))
        process.start()
        there.close()
        for _ in range(words):
            finished = here.recv()
        time.sleep(instants.uniform(0, 0.05))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                finished = here.recv()
        path = store.newest(folder)
        assert path is not None
        step = store.step_of(path)
        assert step >= finished
        assert all(torch.equal(store.read_tensor(path, name), torch.full((64, 64), float(step))) for name in "abc")
    return step
