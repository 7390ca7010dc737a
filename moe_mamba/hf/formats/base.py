"""What a checkpoint format is: which models it holds, its config.json, and whose view each of its tensors is."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.errors import UserError, brief
from moe_mamba.hf.formats.settings import LARGEST, MOST_LAYERS, MOST_REAL, Configuration, Settings
from moe_mamba.model.mixers import MIXERS, VARIANTS
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.pattern import check_pattern, has, kinds


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs, as a view of one tensor of ours, so that one table serves both ways.

    Out: ``view(ours)`` is theirs. In: ``view(ours).copy_(theirs)``.

    Attributes:
        theirs: its name in their files.
        ours: name of the logical tensor.
        view: from ours to theirs: slices, transpositions, axes of size one; it never copies.
    """

    theirs: str
    ours: str
    view: Callable[[Tensor], Tensor]


class Format(Protocol):
    """A format that checkpoints come in.

    Attributes:
        name: as users write it.
        architecture: the class that reads it.
    """

    name: str
    architecture: str

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """The model that a config.json describes.

        Raises:
            UserError: it has a setting that ours lacks, or an unknown key; the line names the key.
        """

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """Every tensor of theirs, in the order of ours; each tensor of ours is made up by its entries.

        Args:
            model: sizes.
            moe: sizes.
            stacked: experts as Transformers 5 has them in memory, one tensor per layer, where the files on the hub have
                one a matrix; other formats have only one way.
        """


class WayOut(Format, Protocol):
    """A format that ours can be written in as well."""

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """Which layer or setting of ours it lacks, in one line; None: it holds the model exactly."""

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """Its config.json, without token ids and dtype."""


def same(theirs: str, ours: str) -> Entry:
    """A tensor that is the same in both."""
    return Entry(theirs, ours, lambda tensor: tensor)


def edges(model: ModelConfig, embedding: str, norm: str) -> tuple[Entry, list[Entry]]:
    """The embedding's entry, and those of the final norm and the head (none where it is tied)."""
    last = [same(f"{norm}.weight", "final_norm.weight")]
    if not model.tied_head:
        last.append(same("lm_head.weight", "head.weight"))
    return same(f"{embedding}.weight", "embedding.weight"), last


def attention_entries(theirs: str, ours: str, bias: bool = False) -> Iterator[Entry]:
    """Attention's four projections, named alike everywhere."""
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for part in ("weight", "bias") if bias else ("weight",):
            yield same(f"{theirs}.{projection}.{part}", f"{ours}.{projection}.{part}")


def mamba_entries(theirs: str, ours: str, norms: Mapping[str, str] | None = None) -> Iterator[Entry]:
    """A Mamba mixer; ``norms``: our name -> their name of those inside."""
    for part in ("A_log", "D", "in_proj.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
        yield same(f"{theirs}.{part}", f"{ours}.{part}")
    yield Entry(f"{theirs}.conv1d.weight", f"{ours}.conv1d.weight", lambda weight: weight.unsqueeze(1))
    yield same(f"{theirs}.out_proj.weight", f"{ours}.out_proj.weight")
    for our_norm, their_norm in (norms or {}).items():
        yield same(f"{theirs}.{their_norm}.weight", f"{ours}.{our_norm}.weight")


def gated_entries(theirs: str, ours: str, width: int, bias: bool = False) -> Iterator[Entry]:
    """A SwiGLU feed-forward layer; the rows of our input projection, and its bias, are [gate | up]."""
    parts = ("weight", "bias") if bias else ("weight",)
    for part in parts:
        yield Entry(f"{theirs}.gate_proj.{part}", f"{ours}.in_proj.{part}", lambda tensor: tensor[:width])
        yield Entry(f"{theirs}.up_proj.{part}", f"{ours}.in_proj.{part}", lambda tensor: tensor[width:])
    yield from (same(f"{theirs}.down_proj.{part}", f"{ours}.out_proj.{part}") for part in parts)


def expert_entries(
    theirs: str, ours: str, experts: int, width: int, names: tuple[str, str, str], stacked: bool
) -> Iterator[Entry]:
    """SwiGLU experts: ours are (experts, in, out) with columns [gate | up], theirs (out, in).

    Args:
        theirs: their prefix.
        ours: our prefix.
        experts: how many.
        width: hidden width.
        names: of gate, up and down.
        stacked: see ``Format.entries``.
    """
    if stacked:
        yield Entry(f"{theirs}.gate_up_proj", f"{ours}.in_proj", lambda weight: weight.transpose(1, 2))
        yield Entry(f"{theirs}.down_proj", f"{ours}.out_proj", lambda weight: weight.transpose(1, 2))
        return
    gate, up, down = names
    for e in range(experts):
        yield Entry(f"{theirs}.{e}.{gate}.weight", f"{ours}.in_proj", partial(_columns, expert=e, stop=width))
        yield Entry(f"{theirs}.{e}.{up}.weight", f"{ours}.in_proj", partial(_columns, expert=e, start=width))
    for e in range(experts):
        yield Entry(f"{theirs}.{e}.{down}.weight", f"{ours}.out_proj", partial(_columns, expert=e))


def _columns(weight: Tensor, expert: int, start: int | None = None, stop: int | None = None) -> Tensor:
    """Columns of one expert's matrix (in, out), as (out, in)."""
    return weight[expert, :, start:stop].t()


def expert_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Hidden width of an expert."""
    return moe.d_expert or model.resolved_d_ff


def describe_layer(model: ModelConfig, index: int) -> str:
    """A layer in a message: ``layer 3 is attention (*)``."""
    mixers = [MIXERS[letter] for letter in model.layers[index]]
    return f"layer {index} is " + " and ".join(f"{mixer.title} ({mixer.letter})" for mixer in mixers)


def stack_refusal(model: ModelConfig, moe: MoEConfig, architecture: str) -> str | None:
    """What no class of Transformers' has that ours are translated to: other norms, activations, experts in Mamba."""
    variants = [mixer for mixer in kinds(model, moe) if mixer in VARIANTS]
    if variants:
        projections = ",".join(moe.inner.projections)
        return f"moe.inner.projections={projections}: {architecture} has no {variants[0].title}"
    if model.norm != "rmsnorm":
        return f"model.norm={model.norm}: {architecture} has only RMSNorm"
    if not model.final_norm:
        return f"model.final_norm=false: {architecture} has a final norm"
    settings = {key for mixer in MIXERS.values() if has(model, mixer) for key in mixer.settings}
    if model.activation != "swiglu" and "activation" in settings:
        return f"model.activation={model.activation}: {architecture} has only SwiGLU"
    if has(model, Mamba) and not model.selective:
        return f"model.selective=false: {architecture} has only the selective scan"
    if has(model, Mamba) and model.resolved_d_inner % model.d_model:
        return f"model.d_inner={model.d_inner}: {architecture} has whole multiples of model.d_model={model.d_model}"
    return None


def attention_refusal(model: ModelConfig, architecture: str, holds: tuple[str, ...] = ()) -> str | None:
    """Which setting of layers ``*`` and ``-`` that few classes have is on, and is none of those that this one holds."""
    settings = {Attention: ("sliding_window", "attention_bias"), FeedForward: ("mlp_bias",)}
    for mixer, keys in settings.items():
        for key in keys:
            value = getattr(model, key)
            if has(model, mixer) and value and key not in holds:
                return f"model.{key}={str(value).lower()}: {architecture} has none"
    return None


def routing_refusal(moe: MoEConfig, architecture: str, renormalize: bool) -> str | None:
    """Why a class that routes dropless, by the softmax's top-k, does not route as ours does."""
    if moe.router == "expert_choice":
        return f"moe.router=expert_choice: in {architecture} tokens choose"
    if moe.scores != "softmax":
        return f"moe.scores={moe.scores}: {architecture} has only softmax"
    if moe.renormalize != renormalize:
        does = "always makes a token's weights sum to one" if renormalize else "leaves a token's weights as they are"
        return f"moe.renormalize={str(moe.renormalize).lower()}: {architecture} {does}"
    if moe.balance == "bias":
        return f"moe.balance=bias: {architecture} has no balancing bias"
    if moe.shared_experts:
        return f"moe.shared_experts={moe.shared_experts}: {architecture} has none"
    if moe.evaluation_capacity is not None:
        return f"moe.evaluation_capacity={moe.evaluation_capacity}: {architecture} drops no token"
    return None


def shortest_pattern(layers: str) -> tuple[str, int]:
    """The shortest pattern, and how often it is repeated, that give ``layers``."""
    whole = len(layers)
    period = next(size for size in range(1, whole + 1) if layers[:size] * (whole // size) == layers)
    return layers[:period], whole // period


def dt_rank(settings: Settings, key: str, d_model: int) -> int:
    """Rank of delta's projection, from a number or ``auto``."""
    if settings.get(key, "auto") == "auto":
        return -(-d_model // 16)
    return settings.number(key)


def read_balance(settings: Settings, top_k: int) -> dict[str, Any]:
    """Our keys for the coefficient of Mixtral's and Jamba's balance loss.

    Their loss is ``top_k`` times ours: shares of the tokens' first, second, ... choices are added up, not averaged.
    """
    weight = settings.real("router_aux_loss_coef", 0.001, least=0) * top_k
    return {"balance": "loss", "balance_weight": weight} if weight else {"balance": "none"}


def balance_coefficient(moe: MoEConfig) -> float:
    """The way out of ``read_balance``."""
    return moe.balance_weight / moe.top_k if moe.balance == "loss" else 0.0


def build(model: Mapping[str, Any], moe: Mapping[str, Any]) -> tuple[ModelConfig, MoEConfig]:
    """Our configuration from values of theirs.

    Raises:
        UserError: the values make no model.
    """
    for key, value in (*model.items(), *moe.items(), *(moe.get("inner") or {}).items()):
        if isinstance(value, int | float) and not abs(value) <= (LARGEST if isinstance(value, int) else MOST_REAL):
            raise UserError(f"config.json: {key} is {brief(value, 40)}, which is too large: fix the file")
    try:
        # JSON has types of its own, so that text is no number here, and neither is true
        built = (
            ModelConfig.model_validate(model, strict=True),
            MoEConfig.model_validate_json(json.dumps(moe), strict=True),  # in Python, no object is a section inside
        )
        if built[0].vocab_size is None:  # in a run's configuration, null stands for the tokenizer's size
            raise ValueError("vocab_size is null, but must be a number")
        if len(built[0].pattern) * built[0].repeat > MOST_LAYERS:
            raise ValueError(f"{built[0].repeat} x {built[0].pattern} are more than {MOST_LAYERS:,} layers")
        check_pattern(*built)
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))} {first['msg'].removeprefix('Value error, ')}"
    except ValueError as error:
        fault = str(error)
    else:
        return built
    raise UserError(f"config.json does not describe a supported model: {brief(fault, 200)}")
