"""The kinds of layers, one file each. The registry: a letter of ``model.pattern`` -> its class, and its variants."""

from moe_mamba.config import MoEConfig
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.base import Mixer
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routed_mamba import RoutedMamba

MIXERS: dict[str, type[Mixer]] = {mixer.letter: mixer for mixer in (Mamba, Attention, FeedForward, MoE)}
VARIANTS: tuple[type[Mixer], ...] = (RoutedMamba,)


def choose_mixer(letter: str, moe: MoEConfig, number: int) -> type[Mixer]:
    """The class of the ``number``-th layer of this letter, counted from 1: the letter's, or a variant of it."""
    variants = (mixer for mixer in VARIANTS if mixer.letter == letter and mixer.serves(moe, number))
    return next(variants, MIXERS[letter])
