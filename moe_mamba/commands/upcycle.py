"""Turn a dense model into a mixture of experts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from moe_mamba.config_types import NonNegativeFloat, Positive, Projections, Range, Seed
from moe_mamba.convert.starting_point import how_to_train
from moe_mamba.convert.upcycle import routing, upcycle
from moe_mamba.errors import UserError


def main(
    checkpoint: str,
    output: str,
    experts: Annotated[int, Range(2, 65_536)],
    top_k: Positive = 1,
    router: Literal["switch", "top_k"] | None = None,
    renormalize: bool | None = None,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    balance: Literal["loss", "bias", "none"] = "loss",
    projections: Projections | None = None,
    inner_router: Literal["own", "shared"] | None = None,
    every: Positive = 1,
    noise: NonNegativeFloat = 0.0,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Sparse upcycling: experts are copies of a dense model's feed-forward layers, and its first pass gives the same.

    With --projections they are copies of projections inside its Mamba layers, and feed-forward layers stay.

    Routers start fresh. With renormalised weights (top_k of 2 or more) nothing else changes; without, they start so
    small that all weights are alike, and the experts' output is scaled to make up for them. The optimizer's state is
    left behind.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        output: the run's folder to write.
        experts: copies of each layer, or projection.
        top_k: experts per token.
        router: switch or top_k; switch where top_k is 1.
        renormalize: the weights of a token's experts sum to one; true where top_k is above 1.
        scores: softmax or sigmoid.
        balance: loss, bias or none, as in moe.balance.
        projections: conv,gate,out, or some of them: what becomes experts in Mamba layers, as in moe.inner.projections.
        inner_router: own, a router for each projection, or shared, one for all; as in moe.inner.router.
        every: replace each such-many-th feed-forward layer, or the projections of each such-many-th Mamba layer.
        noise: what is added to each weight of an expert, as a share of its matrix's root mean square; 0: exact copies.
        seed: of routers and noise.
        overwrite: replace a run's folder that is there, once the new one is whole.
    """
    if inner_router is not None and not projections:
        raise UserError(f"--inner_router={inner_router} without --projections: name what becomes experts inside Mamba")
    inner = {"projections": projections or [], "router": inner_router or "own"}
    keys: dict[str, Any] = {"scores": scores, "balance": balance, "inner": inner}
    moe = routing(experts=experts, top_k=top_k, router=router, renormalize=renormalize, **keys)
    config, step = upcycle(checkpoint, Path(output), moe, every, noise, seed, overwrite)
    of = f"projection ({', '.join(projections)})" if projections else "layer"
    print(f"{checkpoint}: as {config.model.pattern} x {config.model.repeat}, {experts} experts per {of}, in {step}")
    print(how_to_train(Path(output)))
