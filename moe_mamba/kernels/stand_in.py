"""A device that stands for a GPU which is not there, so that its kernels are chosen as the GPU's are, and traced."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StandIn:
    """What the choice of kernels and their launches ask of a GPU.

    Attributes:
        device: type of the device, as torch calls it.
        capability: compute capability of the GPU that it stands for, such as (9, 0).
        multiprocessors: of that GPU.
    """

    device: str
    capability: tuple[int, int]
    multiprocessors: int


_used: dict[str, StandIn] = {}


def use(stand_in: StandIn) -> None:
    """Let a device type stand for a GPU from now on."""
    _used[stand_in.device] = stand_in


def stand_in_for(device: str) -> StandIn | None:
    """What a device type stands for; None: it is what it is."""
    return _used.get(device)
