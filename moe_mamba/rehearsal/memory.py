"""What lies on the device and in the host's memory, from the first tensor to the last: by kind, at any moment."""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

KINDS = ("weights", "gradients", "optimizer", "activations", "communication", "update", "other")
"""What memory is for.

weights, gradients, optimizer: what is kept from step to step, or until the step is made, and gradients on their way.
activations: what forward and backward passes make, the buffers of the layers' own collectives included.
communication: what DeepSpeed makes to gather weights and to reduce gradients.
update: what is made after the last backward pass: norm, clipping, the optimizer's step.
other: what is none of these, such as the batch.
"""


@dataclass
class Allocation:
    """Memory of one tensor or of several that share it.

    Attributes:
        bytes: of it.
        kind: what it is for, one of ``KINDS``.
        is_host: in the host's memory, not on the device.
        place: line of our code that made it.
        is_deepspeed: made by DeepSpeed's code.
    """

    bytes: int
    kind: str
    is_host: bool
    place: str
    is_deepspeed: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by kind.

    Attributes:
        peak: on the device when most of it is taken.
        largest: the most that each kind takes on the device, at whatever time.
        kept: on the device between two steps.
        passes: on the device between the last two micro-steps, where there are several; else as the step begins.
        places: (kind, line of our code) -> bytes of the peak that it made.
        host: the most that lies in the host's memory of what the step keeps there, without what is read and thrown away
            while weights are made.
    """

    peak: dict[str, int]
    largest: dict[str, int]
    kept: dict[str, int]
    passes: dict[str, int]
    host: int
    places: dict[tuple[str, str], int]

    @property
    def total(self) -> int:
        """Of the device, at most."""
        return sum(self.peak.values())


class Ledger:
    """Notes when memory is taken and given back; what it is for may be said later, as long as it lives."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}  # address of a storage's structure -> its number
        self._references: dict[int, weakref.ref[Any]] = {}
        self._allocations: list[Allocation] = []
        self._events: list[tuple[int, bool]] = []  # number, and whether it is taken or given back
        self._pass = 0  # the moment when the last pass began

    @property
    def moment(self) -> int:
        """How much has happened so far."""
        return len(self._events)

    def begin_pass(self) -> None:
        """Note that a forward pass begins."""
        self._pass = self.moment

    def new(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those whose memory is not known yet."""
        return [
            tensor
            for tensor in tensors
            if tensor.device.type != "meta" and tensor.untyped_storage()._cdata not in self._live
        ]

    def take(self, tensors: Iterable[Tensor], kind: str, place: str, is_deepspeed: bool) -> None:
        """Note that memory of tensors was taken."""
        for tensor in tensors:
            storage, is_host = tensor.untyped_storage(), tensor.device.type == "cpu"
            if (address := storage._cdata) not in self._live:  # two may share what is new
                self._live[address] = len(self._allocations)
                self._references[address] = weakref.ref(storage, partial(self._give_back, address))
                self._events.append((len(self._allocations), True))
                self._allocations.append(Allocation(storage.nbytes(), kind, is_host, place, is_deepspeed))

    def _give_back(self, address: int, _: object) -> None:
        self._events.append((self._live.pop(address), False))
        del self._references[address]

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what the memory of tensors is for, from its first moment on."""
        for tensor in tensors:
            number = self._live.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._allocations[number].kind = kind

    def live(self) -> list[Allocation]:
        """What is taken now."""
        return [self._allocations[number] for number in self._live.values()]

    def measure(self, since: int) -> Memory:
        """Bytes by kind since a moment; call it while what a run keeps is alive."""
        now = Counter(dict.fromkeys(KINDS, 0))
        peak, largest, passes, at_peak = dict(now), dict(now), dict(now), -1
        host = most_on_host = most = 0
        for moment, (number, is_taken) in enumerate(self._events):
            one = self._allocations[number]
            if moment == self._pass:
                passes = dict(now)
            if moment == since:
                most_on_host, largest = host, dict(now)
            if one.is_host:
                host += one.bytes if is_taken else -one.bytes
                most_on_host = max(most_on_host, host)
                continue
            now[one.kind] += one.bytes if is_taken else -one.bytes
            if moment < since or not is_taken:
                continue
            largest[one.kind] = max(largest[one.kind], now[one.kind])
            if (total := now.total()) > most:
                most, peak, at_peak = total, dict(now), moment
        return Memory(peak, largest, dict(now), passes, most_on_host, self._places(at_peak))

    def _places(self, moment: int) -> dict[tuple[str, str], int]:
        """Who has made what lies on the device after a moment."""
        there: set[int] = set()
        for number, is_taken in self._events[: moment + 1]:
            (there.add if is_taken else there.discard)(number)
        places: Counter[tuple[str, str]] = Counter()
        for one in (self._allocations[number] for number in there):
            if not one.is_host:
                places[one.kind, one.place] += one.bytes
        return dict(places.most_common())
