"""Experts' products by a function of Transformers' own, where ``experts_implementation`` asks for one."""

import torch
from torch import Tensor, nn

from moe_mamba.hf.shell.kernels import activation
from moe_mamba.model.mixers.moe import Experts

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # Transformers 4
    ALL_EXPERTS_FUNCTIONS = {}  # type: ignore[assignment]

EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Eager is the class's own way, by this package's kernels where it is installed."""


class MoEMambaExperts(Experts):
    """Stacked experts as Transformers' functions see them: under their names for weights and activation.

    Such a function gets rows that are sorted by expert, with one expert each and weight 1: capacity, dropped tokens and
    experts' choice are the router's and the dispatcher's, whoever computes the products.
    """

    has_bias = has_post_expert_norm = _is_expert_parallel = False
    is_transposed = is_concatenated = True  # weights are (experts, in, out), gates stand before values

    def __init__(self, whole: Experts) -> None:
        nn.Module.__init__(self)  # takes over the weights
        self.config, self.kernels = whole.config, whole.kernels
        self.in_proj, self.out_proj = whole.in_proj, whole.out_proj
        self.num_experts = len(whole.in_proj)
        self.has_gate = whole.config.activation == "swiglu"

    @property
    def gate_up_proj(self) -> Tensor:
        """(experts, d_model, input width): gates and values, or values alone."""
        return self.in_proj

    up_proj = gate_up_proj

    @property
    def down_proj(self) -> Tensor:
        """(experts, width, d_model)."""
        return self.out_proj

    def act_fn(self, hidden: Tensor) -> Tensor:
        """The activation of (rows, input width), gates among them: (rows, width)."""
        return activation(hidden, self.config.activation, self.kernels)

    _apply_gate = act_fn

    def forward(self, rows: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
        """See ``Experts.forward``."""
        implementation = self.config._experts_implementation  # type: ignore[attr-defined]  # StackConfig's
        if implementation in (None, "eager"):
            return super().forward(rows, counts, capacity)
        place = torch.arange(len(rows), device=rows.device)
        expert = torch.bucketize(place, counts.cumsum(0), right=True)[:, None]  # (rows, 1)
        return ALL_EXPERTS_FUNCTIONS[implementation](self, rows, expert, rows.new_ones(len(rows), 1))
