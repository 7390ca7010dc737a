"""The pattern, parsed: what ``model.pattern`` and ``model.repeat`` say, as a list of layers."""

import re
from collections import Counter
from dataclasses import dataclass

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers import MIXERS, VARIANTS, choose_mixer
from moe_mamba.model.mixers.base import Mixer

MOST_LAYERS = 4096  # letters, parentheses among them; beyond what has been trained, and planned within seconds


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the residual stack.

    Attributes:
        mixers: the kinds that read its normalised input, and whose outputs are added to the residual stream.
    """

    mixers: tuple[type[Mixer], ...]


def layer_specs(config: ModelConfig, moe: MoEConfig) -> list[LayerSpec]:
    """Every layer of the model, in order.

    Raises:
        ValueError: the pattern is empty or too long, has a letter that stands for nothing, or parentheses that make no
            layer.
    """
    if not config.pattern:
        raise ValueError("model.pattern is empty: give one letter per layer, such as ME")
    for letter in config.pattern:
        if letter not in MIXERS and letter not in "()":
            known = ", ".join(f"{key} {mixer.title}" for key, mixer in MIXERS.items())
            raise ValueError(
                f"model.pattern={config.pattern}: unknown letter {letter!r}: choose among {known}, with parentheses "
                "around those that read one input"
            )
    if not re.fullmatch(r"([^()]|\([^()]{2,}\))*", config.pattern):
        raise ValueError(
            f"model.pattern={config.pattern}: parentheses stand around the two or more letters that read one input: "
            "write (ME), or no parentheses"
        )
    if (count := len(config.pattern) * config.repeat) > MOST_LAYERS:
        raise ValueError(
            f"model.pattern has {len(config.pattern):,} letters, {count:,} with model.repeat={config.repeat:,}: "
            f"a model has at most {MOST_LAYERS:,}: lower model.repeat, or shorten the pattern"
        )
    seen: Counter[str] = Counter()

    def mixer(letter: str) -> type[Mixer]:
        seen[letter] += 1
        return choose_mixer(letter, moe, seen[letter])

    return [LayerSpec(tuple(map(mixer, letters))) for letters in config.layers]


def kinds(config: ModelConfig, moe: MoEConfig) -> list[type[Mixer]]:
    """The kinds of mixers that the model has, each once, in order of appearance."""
    return list(dict.fromkeys(mixer for spec in layer_specs(config, moe) for mixer in spec.mixers))


def describe(config: ModelConfig, moe: MoEConfig) -> str:
    """The layers, for people: ``M x 16, experts inside Mamba (conv, gate, out; one router)``."""
    inner = moe.inner
    text = f"{config.pattern} x {config.repeat}"
    if not inner.projections:
        return text
    which = "" if inner.every == 1 else f" in one layer M of {inner.every}"
    routers = "one router" if inner.router == "shared" else "a router each"
    return f"{text}, experts inside Mamba{which} ({', '.join(inner.projections)}; {routers})"


def kernel_operations(config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
    """Operations of our kernels that a training step does -> the size that a back end may limit, 0 where none does."""
    used: dict[str, int] = {}
    for mixer in kinds(config, moe):
        used |= mixer.kernel_operations(config, moe)
    if config.norm == "rmsnorm":
        used["rms_norm"] = 0
    return used | {"cross_entropy": 0}


def has(config: ModelConfig, mixer: type[Mixer]) -> bool:
    """Whether some layer of the model has this kind's letter."""
    return mixer.letter in config.pattern


def check_pattern(config: ModelConfig, moe: MoEConfig) -> None:
    """Refuse a configuration of which no model can be built.

    Raises:
        ValueError: as ``layer_specs``, or as a mixer's ``check``, or no layer has what is asked for.
    """
    for mixer in kinds(config, moe):
        mixer.check(config, moe)
    inner = moe.inner
    if inner.projections and not set(VARIANTS) & set(kinds(config, moe)):
        own = {variant.letter for variant in VARIANTS}
        layers = sum(letter in own for letters in config.layers for letter in letters)
        raise ValueError(
            f"moe.inner.projections={','.join(inner.projections)} and moe.inner.every={inner.every} with "
            f"model.pattern={config.pattern}: none of its {layers} Mamba layers would have experts inside: lower "
            "moe.inner.every, add M to the pattern, or leave moe.inner.projections out"
        )


def has_experts(config: ModelConfig, moe: MoEConfig) -> bool:
    """Whether some layer has routed experts."""
    return any(mixer.routes for mixer in kinds(config, moe))


def looks_ahead(config: ModelConfig, moe: MoEConfig) -> bool:
    """Whether some layer looks at later tokens, so that the model cannot generate."""
    return any(mixer.looks_ahead(config, moe) for mixer in kinds(config, moe))


def depends_on_batch(config: ModelConfig, moe: MoEConfig) -> bool:
    """Whether, in evaluation, a sequence's output depends on what else is in its batch."""
    return any(mixer.depends_on_batch(config, moe) for mixer in kinds(config, moe))
