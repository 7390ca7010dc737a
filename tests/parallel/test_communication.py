"""Every collective of a layout is accounted for, to the byte: what each kind of layer moves, and a step of the engine.

Calls are counted by torch's dispatcher, and again by gloo itself.

Symbols: T tokens of a micro-step of a group of tensor-parallel ranks, d d_model, w bytes of a number of the stream,
R dt_rank, N d_state, K experts, k top_k, V parameters of a rank. The bytes of a call are those of its larger side on a
rank.
"""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.optimizer import parameter_groups
from moe_mamba.parallel.replicas import group_of_replicas
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.parallel.zero3 import gathered_shape
from moe_mamba.train.objective import Objective
from tests.parallel.communication import Collective, counting
from tests.parallel.layouts import GLOBAL_BATCH, LENGTH, Layout, batch_of, build, config_of, share_of
from tests.world import World as Processes

FP32, FP64, INT64 = 4, 8, 8


def micro_step(config: Config) -> list[Collective]:
    """In a worker: what a forward and a backward pass move, without an engine."""
    built = build(config)
    tokens, targets, document_starts = (
        share_of(values, built.topology, 0, config.train.micro_batch) for values in batch_of(0, config)
    )
    objective = Objective(config.moe, 100, 1, built.topology, built.model.balanced_routers())
    with counting() as found:
        output = built.model.train()(tokens, document_starts, targets=targets)
        objective(output.cross_entropy, output.statistics).backward()
    return found


class Expected:
    """What a rank moves in a micro-step, written down layer by layer, and what it holds as other ranks do.

    Attributes:
        calls: of a micro-step.
        replicas: ranks -> elements of the parameters that they hold alike.
    """

    def __init__(self, config: Config, layout: Layout, rank: int) -> None:
        self.config = config
        self.topology = Topology(
            World(rank, layout.ranks, rank, layout.ranks), layout.tensor, layout.expert, layout.expert_tensor
        )
        every = range(layout.ranks)
        others = [Topology(World(r, layout.ranks, r, layout.ranks), layout.tensor) for r in every]
        self.world = tuple(every)
        self.tensor_ranks = tuple(r for r in every if others[r].data_rank == self.topology.data_rank)
        self.lane = tuple(r for r in every if others[r].tensor_rank == self.topology.tensor_rank)
        pool = self.lane if layout.expert_tensor else self.world
        first = pool.index(rank) // layout.expert * layout.expert
        self.expert_peers = pool[first : first + layout.expert]
        self.w = 2 if config.train.precision == "bf16" else FP32
        self.tokens = config.train.micro_batch * config.data.sequence_length
        self.calls: Counter[Collective] = Counter()
        self.replicas: Counter[tuple[int, ...]] = Counter()

    def micro_step(self) -> Counter[Collective]:
        """All of it; what comes back from the experts of a dropless layer depends on the data and is left out."""
        if self.topology.tensor > 1:
            self.vocabulary()
        for letters in self.config.model.layers:
            self.replica(self.config.model.d_model)  # its norm
            for letter in letters:
                {"M": self.mamba, "*": self.attention, "-": self.entry_and_exit, "E": self.experts}[letter]()
            if len(letters) > 1:
                self.together(letters)
        self.statistics()
        return self.calls

    def add(self, kind: str, group: tuple[int, ...], size: int, times: int = 1) -> None:
        if len(group) > 1:
            self.calls[Collective(kind, group, size)] += times

    def replica(self, numbers: int, ranks: int | None = None) -> None:
        """What ranks hold alike: its gradient is summed over them once per step, and in no micro-step."""
        ranks = ranks or self.topology.tensor
        first = self.topology.tensor_rank // ranks * ranks
        if ranks > 1:
            self.replicas[self.tensor_ranks[first : first + ranks]] += numbers

    def entry_and_exit(self) -> None:
        """T d w gathered at the entry and T d w reduce-scattered at the exit; backward the other way round."""
        size = self.tokens * self.config.model.d_model * self.w
        self.add("all-gather", self.tensor_ranks, size, 2)
        self.add("reduce-scatter", self.tensor_ranks, size, 2)

    def together(self, letters: str) -> None:
        """Mixers that read one input have one entry and one exit, those whose ranks have parts of their sums."""
        experts = self.topology.expert_tensor * (1 + bool(self.config.moe.shared_experts))
        joined = sum(experts if letter == "E" else 1 for letter in letters)
        size = self.tokens * self.config.model.d_model * self.w
        for kind in ("all-gather", "reduce-scatter") * (joined > 1 and len(self.tensor_ranks) > 1):
            self.calls[Collective(kind, self.tensor_ranks, size)] -= 2 * (joined - 1)

    def vocabulary(self) -> None:
        """Embedding and head as one entry and exit; the maximum, and together the target's logit and the sum: 3 T."""
        self.entry_and_exit()
        self.add("all-reduce", self.tensor_ranks, self.tokens * FP32)
        self.add("all-reduce", self.tensor_ranks, 2 * self.tokens * FP32)
        self.replica(self.config.model.d_model)  # the final norm

    def mamba(self) -> None:
        """Besides entry and exit: T (R + 2 N) w of delta, B and C forward, and as much of gradient backward."""
        model = self.config.model
        self.entry_and_exit()
        size = self.tokens * (model.resolved_dt_rank + 2 * model.d_state) * self.w
        self.add("all-reduce", self.tensor_ranks, size, 2)
        for numbers in (model.resolved_dt_rank, model.d_state, model.d_state):  # norms of dt, B and C
            self.replica(numbers)

    def attention(self) -> None:
        """Entry and exit, and no more; key and value heads may be held by several ranks."""
        model = self.config.model
        self.entry_and_exit()
        copies = max(1, self.topology.tensor // model.resolved_kv_heads)
        if copies > 1:
            numbers = model.d_model * model.d_model // model.heads
            self.replica(2 * numbers, copies)

    def experts(self) -> None:
        """Dispatch and combine, twice: T/tensor k d w with a dropless router, K x capacity x d w with a capacity.

        A dropless router sends the K counts as well. With shared experts, or with experts sharded by tensor, there is
        an entry and an exit like that of any other layer.
        """
        moe, topology = self.config.moe, self.topology
        tokens = self.tokens if topology.expert_tensor else self.tokens // topology.tensor
        row = self.config.model.d_model * self.w
        if moe.capacity_factor is None:
            self.add("all-to-all", self.expert_peers, moe.experts * INT64)
            self.add("all-to-all", self.expert_peers, tokens * moe.top_k * row, 2)  # there, and back's gradient
        else:
            capacity = int(moe.capacity_factor * moe.top_k * tokens / moe.experts)
            self.add("all-to-all", self.expert_peers, moe.experts * capacity * row, 4)
        self.replica(moe.experts * self.config.model.d_model)  # the router
        for _ in range(topology.expert_tensor + bool(moe.shared_experts)):
            self.entry_and_exit()

    def statistics(self) -> None:
        """2 K + 4 numbers of each layer of experts, of all layers in one call, over the world."""
        if layers := sum(letters.count("E") for letters in self.config.model.layers):
            self.add("all-reduce", self.world, layers * (2 * self.config.moe.experts + 4) * FP32)


def compare(ranks: list[list[Collective]], config: Config, layout: Layout) -> None:
    """Every call is expected; the rows that a dropless layer's experts return are as many as were sent to them."""
    rows = Counter[tuple[int, ...]]()
    for rank, found in enumerate(ranks):
        expected = Expected(config, layout, rank)
        wanted, calls = expected.micro_step(), Counter(found)
        returned = calls - wanted
        assert not wanted - calls, f"rank {rank} did not"
        if config.moe.capacity_factor is None and "E" in config.model.pattern and layout.expert > 1:
            assert {(kind, group) for kind, group, _ in returned} == {("all-to-all", expected.expert_peers)}
            assert all(times % 2 == 0 for times in returned.values())  # forward and backward alike
            tokens = expected.tokens // (1 if layout.expert_tensor else layout.tensor)
            sent = tokens * config.moe.top_k * config.model.d_model * expected.w
            rows[expected.expert_peers] += sum(call.bytes * times for call, times in returned.items()) // 2 - sent
        else:
            assert not returned, f"rank {rank} should not"
    assert not any(rows.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("pattern", ["M", "*", "-", "(M*-)"])
def test_layers_sharded_by_tensor(world: Processes, pattern: str, tensor: int, precision: str) -> None:
    layout = Layout(tensor, tensor)
    config = config_of(pattern, layout, train__precision=precision)
    compare(world.run(micro_step, config, ranks=tensor), config, layout)


def micro_step_in_chunks(config: Config) -> list[Collective]:
    """In a worker: as ``micro_step``, with the head in four chunks of tokens."""
    with mock.patch.object(linear, "CHUNK", 50_000):  # 192 tokens x 256 words, padding included, x 4 bytes
        return micro_step(config)


def test_chunks_of_the_head_move_the_same_bytes_in_more_calls(world: Processes) -> None:
    config = config_of("-", Layout(2, 2))
    whole, chunked = (world.run(function, config, ranks=2) for function in (micro_step, micro_step_in_chunks))
    tokens = GLOBAL_BATCH * LENGTH
    for one, other in zip(whole, chunked, strict=True):
        gone, came = Counter(one) - Counter(other), Counter(other) - Counter(one)
        assert gone == {Collective("all-reduce", (0, 1), size * tokens * FP32): 1 for size in (1, 2)}
        assert came == {Collective("all-reduce", (0, 1), size * tokens // 4 * FP32): 4 for size in (1, 2)}


def validation(config: Config) -> list[Collective]:
    """In a worker: what scores of a batch move, without gradients."""
    built = build(config)
    tokens, targets, document_starts = batch_of(0, config)
    with counting() as found, torch.no_grad():
        built.model.eval()(tokens, document_starts, targets=targets)
    return found


def test_scores_move_four_numbers_of_each_token(world: Processes) -> None:
    """Of the loss the maximum, the target's logit and the sum; of the argmax the maximum, and an id of 8 bytes."""
    config = config_of("-", Layout(2, 2))
    tokens = GLOBAL_BATCH * LENGTH
    sizes = Counter({tokens * FP32: 2, 2 * tokens * FP32: 1}) + Counter({tokens * INT64: 1})
    for found in world.run(validation, config, ranks=2):
        assert Counter(call.bytes for call in found if call.kind == "all-reduce") == sizes


def test_key_heads_for_every_tensor_rank_have_no_gradients_to_sum(world: Processes) -> None:
    config = config_of("*", Layout(4, 4), model__kv_heads=4)
    compare(world.run(micro_step, config, ranks=4), config, Layout(4, 4))


EXPERT_LAYOUTS = [
    Layout(2, 1, 2),
    Layout(4, 2, 2),
    Layout(4, 2, 2, expert_tensor=True),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            Layout(4, 1, 4),
            Layout(2, 2, 2),
            Layout(4, 2, 4),
            Layout(4, 4, 2),
            Layout(2, 2, 1, expert_tensor=True),
        )
    ),
]
KINDS_OF_EXPERTS = {
    "dropless": {},
    "top 2": {"moe__router": "top_k", "moe__top_k": 2, "train__precision": "bf16"},
    "capacity": {"moe__capacity_factor": 1.25},
    "shared": {"moe__shared_experts": 1, "moe__capacity_factor": 1.0, "train__precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS_OF_EXPERTS)
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
def test_experts(world: Processes, layout: Layout, kind: str) -> None:
    config = config_of("E", layout, **KINDS_OF_EXPERTS[kind])
    compare(world.run(micro_step, config, ranks=layout.ranks), config, layout)


@pytest.mark.parametrize("kind", ["capacity", "shared"])
def test_experts_sharded_by_tensor_enter_and_leave_with_the_other_mixers(world: Processes, kind: str) -> None:
    layout = Layout(4, 2, 2, expert_tensor=True)
    config = config_of("(ME)", layout, **KINDS_OF_EXPERTS[kind])
    compare(world.run(micro_step, config, ranks=layout.ranks), config, layout)


def test_layers_add_up_and_statistics_travel_once(world: Processes) -> None:
    layout = Layout(4, 2, 2)
    config = config_of("MEM-*E", layout, moe__capacity_factor=1.0, moe__balance="bias")
    ranks = world.run(micro_step, config, ranks=4)
    compare(ranks, config, layout)
    assert sum(call.group == (0, 1, 2, 3) for call in ranks[0]) == 1


@pytest.mark.parametrize("pattern", ["M", "E", "MEM-*E"])
def test_replicas_of_data_parallelism_say_nothing_before_the_step(world: Processes, pattern: str) -> None:
    for found in world.run(micro_step, config_of(pattern, Layout(2)), ranks=2):
        assert len(found) == ("E" in pattern)  # the statistics


Parameters = list[list[tuple[int, tuple[int, ...]]]]
"""Of each group of the engine's: elements of its parameters on a rank, and the ranks that hold the same ones."""


def engine_step(config: Config) -> tuple[list[Collective], list[Collective], Parameters]:
    """In a worker: what starting the engine moves, what its second step does, and its parameters."""
    built = build(config)
    topology, micro_batch = built.topology, config.train.micro_batch
    micro_steps = topology.sequences_per_data_rank(config.train.global_batch, micro_batch) // micro_batch
    groups = [
        [(gathered_shape(p).numel(), replicas_of(p)) for p in group["params"]]
        for group in parameter_groups(built.model, config)
    ]
    with counting() as start:
        engine = engines.build_engine(built.model, config, built.groups, micro_batch)
    for step in range(2):
        objective = Objective(config.moe, 100, micro_steps, topology, built.model.balanced_routers())
        with counting() as found:
            for number in range(micro_steps):
                values = (share_of(value, topology, number, micro_batch) for value in batch_of(step, config))
                tokens, targets, document_starts = values
                output = engine(tokens, document_starts, targets=targets)
                engine.backward(objective(output.cross_entropy, output.statistics))
                if number < micro_steps - 1:
                    engine.step()
            engines.step(engine, config.train.gradient_clip)
    return start, found, groups


def replicas_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    group = group_of_replicas(parameter)
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def owned_replicas(groups: Parameters, layout: Layout, data_rank: int) -> Counter[tuple[int, ...]]:
    """Ranks -> elements of the replicas whose gradients lie on a data rank before a step.

    At ZeRO 0 all of them. At ZeRO 1 and 2 a group's parameters lie one after the other, padded to a multiple of two
    numbers per rank, and each data rank has one of as many parts. At ZeRO 3 it has a part of each parameter, padded.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for group in groups:
        part, end = -(-sum(numbers for numbers, _ in group) // (2 * layout.data)) * 2, 0
        for numbers, replicas in group:
            begin, end = end, end + numbers
            mine = {
                0: numbers,
                3: -(-numbers // layout.data),
            }.get(layout.zero, max(0, min(end, part * (data_rank + 1)) - max(begin, part * data_rank)))
            if replicas and mine:
                found[replicas] += mine
    return found


def add_replicas(expected: Expected, groups: Parameters, layout: Layout) -> None:
    """One all-reduce of each group of ranks with what the data rank has of their replicas, in fp32."""
    data_ranks = [owned_replicas(groups, layout, rank) for rank in range(layout.data)]
    total = sum(data_ranks, Counter())
    copies = layout.data if layout.zero == 0 else 1
    padding = layout.data * sum(map(len, groups)) if layout.zero == 3 else 0
    for ranks, numbers in expected.replicas.items():
        assert numbers * copies <= total[ranks] <= numbers * copies + padding
    for ranks, numbers in data_ranks[expected.topology.data_rank].items():
        expected.add("all-reduce", ranks, numbers * FP32)


def whole_step(config: Config, layout: Layout, rank: int, groups: Parameters) -> Counter[Collective]:
    """What the engine moves in a step, the micro-steps' own included; the last of its groups is the experts'.

    At ZeRO 0 and 1 gradients are all-reduced once per step, at ZeRO 2 in each micro-step: V x 4, in one bucket for
    experts and one for all else. DeepSpeed's ZeRO all-reduces where a reduce-scatter would do: it is half of the bytes
    that the links carry. Then come the replicas'. ZeRO then gathers the new weights of each group of parameters, padded
    to a multiple of two numbers per rank.
    """
    expected = Expected(config, layout, rank)
    lane, total = expected.lane, Counter(expected.micro_step())
    total = total + total
    sizes = [sum(numbers for numbers, _ in group) for group in groups]
    *common, experts = sizes
    expected.calls = Counter()
    times = 2 if layout.zero == 2 else 1
    expected.add("all-reduce", lane, sum(common) * FP32, times)
    expected.add("all-reduce", lane, experts * FP32, times)  # the ranks with the same experts are those of a lane here
    add_replicas(expected, groups, layout)
    expected.add("all-reduce", expected.world, FP64)  # the norm; in a run the loss and what the ranks tell, too
    if layout.zero:
        unit = 2 * len(lane)
        for size in sizes:
            expected.add("all-gather", lane, -(-size // unit) * unit * FP32)
    return total + expected.calls


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_whole_step_of_the_engine_moves_nothing_else(world: Processes, zero: int) -> None:
    layout = Layout(4, 2, 2, zero)
    config = config_of("ME", layout, 2, moe__capacity_factor=1.0)
    for rank, (start, found, groups) in enumerate(world.run(engine_step, config, ranks=4)):
        assert Counter(found) == whole_step(config, layout, rank, groups)
        lane = Expected(config, layout, rank).lane
        # DeepSpeed sends every parameter once, though all ranks have made the same numbers.
        assert {(kind, group) for kind, group, _ in start} == {("broadcast", lane)}
        assert sum(call.bytes for call in start) == sum(numbers for group in groups for numbers, _ in group) * FP32


def all_reduces(calls: Counter[Collective]) -> Counter[Collective]:
    """Those between ranks of more than a number or two, which are norms."""
    return Counter(
        {
            call: times
            for call, times in calls.items()
            if call.kind == "all-reduce" and len(call.group) > 1 and call.bytes > 16
        }
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensor_ranks_under_zero_3_sum_their_parts_of_replicas(world: Processes, precision: str) -> None:
    layout = Layout(4, 2, zero=3)
    config = config_of("M-", layout, 2, train__precision=precision)
    for rank, (_, found, groups) in enumerate(world.run(engine_step, config, ranks=4)):
        expected = Expected(config, layout, rank)
        in_micro_steps = Counter(expected.micro_step())
        expected.calls = Counter()
        add_replicas(expected, groups, layout)
        calls = Counter(call for call in found if call.group == expected.tensor_ranks)
        assert all_reduces(calls) == all_reduces(in_micro_steps + in_micro_steps + expected.calls)


@pytest.mark.parametrize(
    ("zero", "pattern", "micro_steps"),
    [
        (1, "*", 1),
        (1, "*-**", 3),
        *(pytest.param(zero, "*-**", 3, marks=pytest.mark.slow) for zero in (0, 2, 3)),
    ],
)
def test_replicas_take_one_all_reduce_of_each_group_per_step(
    world: Processes, zero: int, pattern: str, micro_steps: int
) -> None:
    """Whatever the layers and micro-steps: here all four ranks hold norms alike, and pairs of them key heads."""
    layout = Layout(4, 4, zero=zero)
    config = config_of(pattern, layout, micro_steps, train__precision="bf16" if zero else "fp32")
    for rank, (_, found, _) in enumerate(world.run(engine_step, config, ranks=4)):
        expected = Expected(config, layout, rank)
        in_micro_step = expected.micro_step()
        in_micro_steps = Counter({call: times * micro_steps for call, times in in_micro_step.items()})
        pairs = {Collective("all-reduce", ranks, numbers * FP32): 1 for ranks, numbers in expected.replicas.items()}
        assert len(pairs) == 2
        assert all_reduces(Counter(found) - in_micro_steps) == pairs
