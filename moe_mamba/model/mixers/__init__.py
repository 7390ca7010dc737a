"""The kinds of layers, one file each. The registry: a letter of ``model.pattern`` -> its class."""

from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.base import Mixer
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import MoE

MIXERS: dict[str, type[Mixer]] = {mixer.letter: mixer for mixer in (Mamba, Attention, FeedForward, MoE)}
