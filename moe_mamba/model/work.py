"""What a layer computes and sends in a micro-step: the words in which mixers declare it, and their sum over a layer.

A mixer knows no rank. It is asked with the sizes of one rank's part (``Share``), and answers with products, scans and
passes over memory, and with collectives over groups that have names: those of ``model/sharding.py``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from moe_mamba.config import ModelConfig, MoEConfig

FP32, INT64 = 4, 8  # bytes
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


class Rows(NamedTuple):
    """What a rank exchanges with the experts of its group.

    Attributes:
        sent: rows of this rank's tokens, for the experts of all ranks.
        received: rows of all ranks' tokens, for the experts of this rank.
    """

    sent: int
    received: int


@dataclass(frozen=True)
class Share:
    """A rank's part of a micro-step: sizes, and no rank.

    Attributes:
        batch: sequences of the micro-batch of a group of tensor-parallel ranks.
        length: tokens of a sequence.
        width: bytes of a number of the stream.
        rows_of: (group, router's name in its mixer, experts, rows that a rank sends) -> what is sent and received.
        tensor: ranks that share each layer.
        expert: ranks that share the experts of a layer.
        inner_expert: ranks that share the experts inside a mixer.
        expert_tensor: whether each expert is shared by the tensor-parallel ranks.
        resets: whether a sequence has several documents, which do not see one another.
    """

    batch: int
    length: int
    width: int
    rows_of: Callable[[str, str, int, int], Rows]
    tensor: int = 1
    expert: int = 1
    inner_expert: int = 1
    expert_tensor: bool = False
    resets: bool = False

    @property
    def tokens(self) -> int:
        """Of a group of tensor-parallel ranks."""
        return self.batch * self.length


class Sent(NamedTuple):
    """Calls of one collective in a micro-step, of one rank.

    Attributes:
        kind: of the collective.
        group: whose ranks take part: a name of ``model/sharding.py``.
        bytes: of a call, of its larger side on the rank; of an all-to-all, what it sends.
        forward: calls in the forward pass.
        backward: calls in the backward pass.
        is_repeated: whether recomputation makes the forward's calls again; not those behind the last tensor of a layer
            that the backward pass needs.
        part: what it belongs to, for people.
        begins: whether other mixers of the layer compute while it travels.
    """

    kind: Kind
    group: str
    bytes: int
    forward: int = 0
    backward: int = 0
    is_repeated: bool = True
    part: str = "tensor"
    begins: bool = False


class Product(NamedTuple):
    """Matrix products forward; the backward pass takes two of the same size.

    Attributes:
        rows: of all groups together.
        inner: summed over.
        out: columns.
        groups: stacked experts that share the rows; 0: it is no expert's.
        is_fp32: whether it is in fp32 whatever the stream is in (routers).
    """

    rows: int
    inner: int
    out: int
    groups: int = 0
    is_fp32: bool = False

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        return 2 * self.rows * self.inner * self.out


class Attended(NamedTuple):
    """Queries with keys and weights with values, forward: floating-point operations; backward twice as many.

    Attributes:
        flops: of the pairs of tokens that see one another.
        bytes: of queries, keys, values and outputs.
    """

    flops: int
    bytes: int


class Scan(NamedTuple):
    """A selective scan: 9 operations a state forward, 18 backward (Mamba, section 4.5), on the plain units.

    Attributes:
        tokens: that it goes over.
        channels: of this rank.
        states: of a channel.
        width: bytes of a number of what it reads and writes.
    """

    tokens: int
    channels: int
    states: int
    width: int

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        return 9 * self.tokens * self.channels * self.states


class Pass(NamedTuple):
    """Passes over memory with little arithmetic.

    Attributes:
        forward: bytes read and written in the forward pass.
        backward: in the backward pass.
        operators: calls of operators in the forward pass; the backward pass has twice as many.
    """

    forward: int
    backward: int
    operators: int = 1


Work = Product | Attended | Scan | Pass


def norm_work(tokens: int, d_model: int, width: int) -> Pass:
    """A norm that adds an update to the stream: two tensors in, two out, forward and backward alike."""
    return Pass(4 * tokens * d_model * width, 5 * tokens * d_model * width, 2)


def activation_work(rows: int, made: int, hidden: int, width: int) -> Pass:
    """An activation of ``made`` columns to ``hidden`` ones; backward it reads those again."""
    return Pass(rows * (made + hidden) * width, rows * (2 * made + hidden) * width, 2)


def layer_norm_work(config: ModelConfig, share: Share) -> Pass:
    """What a layer computes beside its mixers."""
    return norm_work(share.tokens // share.tensor, config.d_model, share.width)


def vocabulary_work(config: ModelConfig, share: Share, rows: int) -> list[Work]:
    """Embedding, final norm, head and loss, of a rank that holds ``rows`` of the vocabulary.

    The head's gradients are made with its logits, which are written, read for the loss, and overwritten by theirs.
    """
    stream, logits = share.tokens // share.tensor * config.d_model * share.width, share.tokens * rows * share.width
    return [
        Pass(2 * stream, 3 * stream, 2),
        norm_work(share.tokens // share.tensor, config.d_model, share.width),
        Product(share.tokens, config.d_model, rows),
        Pass(6 * logits, rows * config.d_model * FP32, 8),
    ]


class Crossing(Protocol):
    """What is asked of a kind of mixer to know how a layer of several enters and leaves."""

    gathers_tokens: ClassVar[bool]
    routes: ClassVar[bool]

    @classmethod
    def crossings(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> int:
        """See ``Mixer``."""


def layer_crossings(
    mixers: Sequence[type[Crossing]], config: ModelConfig, moe: MoEConfig, share: Share
) -> Iterator[Sent]:
    """What the mixers of a layer send at their entries and exits.

    Those of several whose ranks have parts of their sums enter and leave together; see ``ParallelMixers``.
    """
    times = [mixer.crossings(config, moe, share) for mixer in mixers]
    if len(times) == 1:
        return crossings(share, config.d_model, times[0])
    joins = [mixer.gathers_tokens or (mixer.routes and share.expert_tensor) for mixer in mixers]
    apart = sum(one for one, joined in zip(times, joins, strict=True) if not joined)
    # The exit of those that join comes last of all, behind the exit of the last that does not.
    return itertools.chain(crossings(share, config.d_model, apart), crossings(share, config.d_model, int(any(joins))))


def crossings(share: Share, d_model: int, times: int) -> Iterator[Sent]:
    """Entries and exits of the tokens of tensor-parallel ranks: gathered, and their sums scattered; backward turned.

    Recomputation repeats all but the last exit, behind which the backward pass needs nothing of the layer.
    """
    size = share.tokens * d_model * share.width
    for number in range(times):
        yield Sent("all-gather", "tensor", size, forward=1)
        yield Sent("reduce-scatter", "tensor", size, backward=1)
        yield Sent("reduce-scatter", "tensor", size, forward=1, is_repeated=number < times - 1)
        yield Sent("all-gather", "tensor", size, backward=1)


def exchange(group: str, rows: Rows, there: int, back: int, begins: bool = True) -> Iterator[Sent]:
    """Rows on their way to experts and back, and their gradients, which go the other way.

    Args:
        group: whose ranks share the experts.
        rows: that are exchanged.
        there: bytes of a row on its way to the experts.
        back: bytes of a row on its way back.
        begins: whether other work goes on while the rows travel to their experts.
    """
    yield Sent("all-to-all", group, rows.sent * there, forward=1, part="experts", begins=begins)
    yield Sent("all-to-all", group, rows.received * there, backward=1, part="experts", begins=begins)
    yield Sent("all-to-all", group, rows.received * back, forward=1, part="experts")
    yield Sent("all-to-all", group, rows.sent * back, backward=1, part="experts")


def counts_sent(group: str, experts: int) -> Sent:
    """The numbers of rows that ranks tell one another where no capacity says them."""
    return Sent("all-to-all", group, experts * INT64, forward=1, part="counts")


def routing_work(tokens: int, d_model: int, experts: int, rows: int, width: int, ranks: int) -> list[Work]:
    """What it takes to route tokens, and to bring rows of one width to their experts and their sums back.

    Args:
        tokens: that are routed.
        d_model: width of a row.
        experts: among which.
        rows: that go to experts.
        width: bytes of a number.
        ranks: among which the experts are spread; rows are put in order again after and before they travel.
    """
    row, scores = d_model * width, tokens * experts * FP32
    work: list[Work] = [
        Product(tokens, d_model, experts, is_fp32=True),
        Pass(6 * scores, 6 * scores, 20),  # softmax, choice, statistics
        Pass(2 * rows * row, (rows + tokens) * row, 3),  # gather, and its gradient's sum
        Pass((rows + tokens) * row, (2 * rows + tokens) * row, 3),  # weighted sum
    ]
    if width != FP32:
        work.append(Pass(tokens * d_model * (width + FP32), tokens * d_model * (width + FP32)))
    if ranks > 1:
        work.append(Pass(4 * rows * row, 4 * rows * row, 10))
    return work
