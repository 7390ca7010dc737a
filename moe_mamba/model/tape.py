"""What a pass keeps for its backward pass, and the most that it takes: autograd's bookkeeping over sizes alone.

A mixer declares its forward pass as operations on a ``Tape``: what each makes, and what autograd keeps of it. From that
follow what is kept, and, by going through the operations backwards as autograd does, the largest sum of what is still
kept and of gradients on their way. Nothing is computed, and no tensor is made.

What is left out: numbers that do not grow with tokens times width (masks of a row, counts, sums), and what a back end
takes inside one call where a declaration does not say so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moe_mamba.model.work import FP32

Where = Literal["own", "joint", "handed", "kept"]


@dataclass(eq=False)
class Recorded:
    """A tensor of a pass.

    Attributes:
        bytes: of it, as of its gradient.
        base: whose memory it has, where it is a view; None: its own.
        has_gradient: whether a gradient comes back to it.
    """

    bytes: int
    base: "Recorded | None" = None
    has_gradient: bool = True

    @property
    def memory(self) -> "Recorded":
        """Whose memory it has."""
        return self if self.base is None else self.base


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass, and its backward.

    Attributes:
        reads: tensors that get a gradient of it.
        makes: what it gives.
        keeps: tensors that its backward needs, and so keeps.
        weights: bytes of its weights' gradients, which are added to the others' at once.
        gradient: where the gradients of what it reads lie: each in its ``own`` new memory, all in one (``joint``), in
            that of the gradient of what it makes (``handed``), or in the first memory that it kept (``kept``).
        forward: bytes that it takes for a while.
        backward: bytes that its backward takes for a while.
        held: tensors that whoever calls it still has in hand.
    """

    reads: tuple[Recorded, ...]
    makes: tuple[Recorded, ...]
    keeps: tuple[Recorded, ...]
    weights: int
    gradient: Where
    forward: int
    backward: int
    held: tuple[Recorded, ...]


@dataclass(frozen=True)
class Peak:
    """Bytes of a part of a model.

    Attributes:
        kept: from its forward to its backward.
        forward: at most while it runs forward, what it has kept so far included.
        backward: at most while it runs backward, what it still keeps and the gradient it began with included.
        again: at most while it runs forward anew, for its backward: gradients are on their way by then.
    """

    kept: int
    forward: int
    backward: int
    again: int


@dataclass
class Tape:
    """The operations of a forward pass.

    Attributes:
        width: bytes of a number of the stream.
        fused: whether Triton's kernels run (on GPUs), which keep less than torch's own operations.
        hidden: whether to count what back ends take inside a call, which no tracker of tensors sees.
        is_sharded: whether ZeRO-3 shards the weights, which then are fp32 and cast where they are used.
        on_cpu: whether the head's chunks are those of a CPU.
    """

    width: int
    fused: bool = False
    hidden: bool = True
    is_sharded: bool = False
    on_cpu: bool = False
    operations: list[Operation] = field(default_factory=list)

    def tensor(self, numbers: int, width: int | None = None, has_gradient: bool = True) -> Recorded:
        """One of so many numbers of ``width`` bytes; by default the stream's."""
        return Recorded(numbers * (self.width if width is None else width), None, has_gradient)

    def view(self, tensor: Recorded, numbers: int, width: int | None = None) -> Recorded:
        """A part of a tensor, in its memory."""
        return Recorded(numbers * (self.width if width is None else width), tensor.memory)

    def do(
        self,
        reads: Sequence[Recorded],
        makes: Sequence[Recorded],
        keeps: Iterable[Recorded] = (),
        weights: int = 0,
        gradient: Where = "own",
        forward: int = 0,
        backward: int = 0,
        held: Iterable[Recorded] = (),
    ) -> None:
        """Record an operation; see ``Operation``."""
        reads = tuple(tensor for tensor in reads if tensor.has_gradient)
        self.operations.append(
            Operation(reads, tuple(makes), tuple(keeps), weights, gradient, forward, backward, tuple(held))
        )

    def one(
        self, *reads: Recorded, numbers: int, width: int | None = None, keeps: Iterable[Recorded] = (), **rest: int
    ) -> Recorded:
        """Record an operation that makes one tensor of so many numbers."""
        made = self.tensor(numbers, width)
        self.do(reads, (made,), keeps, **rest)  # type: ignore[arg-type]
        return made

    def linear(
        self, x: Recorded, rows: int, read: int, made: int, groups: int = 1, width: int | None = None
    ) -> Recorded:
        """A product of (rows, read) with a weight of (read, made), or with stacked ones; it keeps ``x``."""
        numbers = groups * read * made
        cast = self.cast_bytes(numbers)  # before the product, and its gradient after it
        gradients = numbers * (self.width if width is None else width) + (numbers * FP32 if cast else 0)
        return self.one(x, numbers=rows * made, width=width, keeps=(x,), weights=gradients, forward=cast)

    def cast_bytes(self, numbers: int) -> int:
        """Of a weight in the stream's precision, where it is kept in another one."""
        return numbers * self.width if self.is_sharded and self.width < FP32 else 0

    def split(self, x: Recorded, *numbers: int, width: int | None = None) -> tuple[Recorded, ...]:
        """Views of the parts of a tensor; their gradients are joined again."""
        parts = tuple(self.view(x, count, width) for count in numbers)
        self.do((x,), parts)
        return parts

    def reshaped(self, x: Recorded) -> Recorded:
        """Another view, in the same memory as its gradient."""
        made = Recorded(x.bytes, x.memory)
        self.do((x,), (made,), gradient="handed")
        return made

    def add(self, *tensors: Recorded) -> Recorded:
        """A sum: each summand's gradient is the sum's."""
        if len(tensors) == 1:
            return tensors[0]
        made = Recorded(tensors[0].bytes)
        self.do(tensors, (made,), gradient="handed")
        return made

    def peak(self, outputs: Sequence[Recorded], arriving: Sequence[Recorded] = ()) -> Peak:
        """Go through the operations, forward and backward.

        Args:
            outputs: whose gradients begin the backward pass, in one memory.
            arriving: tensors that the pass is given, whose memory is counted elsewhere.
        """
        users = _users(self.operations, arriving)
        kept = sum(tensor.bytes for tensor in users)
        forward = _forward(self.operations, users)
        backward, arrived = _backward(self.operations, users, outputs)
        return Peak(kept, forward, backward, forward + arrived)


def _users(operations: Sequence[Operation], arriving: Sequence[Recorded]) -> dict[Recorded, int]:
    """Memory that is kept -> how many operations keep it."""
    elsewhere, users = {tensor.memory for tensor in arriving}, dict[Recorded, int]()
    for operation in operations:
        for memory in {tensor.memory for tensor in operation.keeps} - elsewhere:
            users[memory] = users.get(memory, 0) + 1
    return users


def _forward(operations: Sequence[Operation], kept: dict[Recorded, int]) -> int:
    """The most that lives forward: tensors until their last reader, and what is kept."""
    last = {
        memory: place for place, one in enumerate(operations) for memory in _memories(one.reads, one.makes, one.held)
    }
    ends: dict[int, list[Recorded]] = {}
    for memory, place in last.items():
        ends.setdefault(place, []).append(memory)
    made, live, most = set(), 0, 0
    for place, operation in enumerate(operations):
        for memory in _memories(operation.makes, operation.keeps):
            # What is read and was never made comes from outside.
            if memory not in made and not _is_outside(memory, operation):
                made.add(memory)
                live += memory.bytes
        most = max(most, live + operation.forward)
        live -= sum(memory.bytes for memory in ends.get(place, ()) if memory in made and memory not in kept)
    return most


def _is_outside(memory: Recorded, operation: Operation) -> bool:
    return any(tensor.memory is memory for tensor in operation.reads)


def _memories(*groups: Iterable[Recorded]) -> dict[Recorded, None]:
    return dict.fromkeys(tensor.memory for group in groups for tensor in group)


def _backward(
    operations: Sequence[Operation], users: dict[Recorded, int], outputs: Sequence[Recorded]
) -> tuple[int, int]:
    """The most that lives backward: what is still kept, gradients on their way, and what an operation takes.

    Beside it: gradients on their way when something that is kept is needed for the first time.
    """
    left, kept = dict(users), sum(memory.bytes for memory in users)
    first = _Gradient(outputs[0].bytes, len(outputs))
    state, arrived = _Gradients(kept + first.bytes, dict.fromkeys(outputs, first)), 0
    for operation in reversed(operations):
        needs = {tensor.memory for tensor in operation.keeps[operation.gradient == "kept" :]}
        if needs and not arrived:
            arrived = state.live - kept
        given = [state.pending.pop(tensor) for tensor in operation.makes if tensor in state.pending]
        shared = state.shared(operation, given)
        for tensor in operation.reads:
            state.add(tensor, state.made(tensor.bytes) if shared is None else shared)
        state.note(operation.weights + operation.backward)
        for gradient in given:
            state.drop(gradient)
        for memory in needs & left.keys():
            left[memory] -= 1
            state.live -= 0 if left[memory] else memory.bytes
    return state.most, arrived


@dataclass
class _Gradient:
    """Memory of a gradient, and how many tensors' it is."""

    bytes: int
    users: int


@dataclass
class _Gradients:
    """Gradients on their way, and the bytes that live, now and at most."""

    live: int
    pending: dict[Recorded, _Gradient]
    most: int = 0

    def __post_init__(self) -> None:
        self.most = self.live

    def note(self, beside: int = 0) -> None:
        self.most = max(self.most, self.live + beside)

    def made(self, size: int) -> _Gradient:
        self.live += size
        return _Gradient(size, 1)

    def shared(self, operation: Operation, given: Sequence[_Gradient]) -> _Gradient | None:
        """The one memory of the gradients of all that an operation reads; None: each has its own."""
        if operation.gradient == "own" or not operation.reads:
            return None
        if operation.gradient == "handed":
            one = given[0]
        else:
            one = _Gradient(operation.reads[0].bytes, 0)
            self.live += one.bytes if operation.gradient == "joint" else 0
        one.users += len(operation.reads)
        return one

    def drop(self, gradient: _Gradient) -> None:
        gradient.users -= 1
        self.live -= 0 if gradient.users else gradient.bytes

    def add(self, tensor: Recorded, gradient: _Gradient) -> None:
        """Add a gradient to what came to a tensor before: in place, where nobody else has that memory."""
        before = self.pending.get(tensor)
        if before is None:
            self.pending[tensor] = gradient
            return
        if before.users > 1:
            self.pending[tensor] = self.made(tensor.bytes)
            self.note()
            self.drop(before)
        self.note()
        self.drop(gradient)
