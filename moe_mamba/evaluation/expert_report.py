"""What experts specialise in, as Markdown and as JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_mamba.evaluation.information import Measure
from moe_mamba.evaluation.specialisation import Agreement, RouterFindings

LOOKS_AHEAD = "experts choose their tokens, later ones among them: this routing is not causal"


@dataclass(frozen=True)
class Read:
    """What was read.

    Attributes:
        source: as the user wrote it.
        identity: hash of its tokens.
        tokens: how many.
        length: of a window, tokens.
        vocabulary: different tokens among them.
        buckets: first place of each bucket of places in a document.
        shuffles: behind each baseline.
    """

    source: str
    identity: str
    tokens: int
    length: int
    vocabulary: int
    buckets: list[int]
    shuffles: int


@dataclass(frozen=True)
class Run:
    """One run's routers.

    Attributes:
        name: of the run.
        checkpoint: the folder that was read.
        routers: label in metrics -> findings.
    """

    name: str
    checkpoint: str
    routers: dict[str, RouterFindings]


def as_json(read: Read, runs: Sequence[Run], agreements: Sequence[Agreement]) -> str:
    """Everything; what is no number becomes null."""
    tree = {"read": asdict(read), "runs": list(map(asdict, runs)), "agreement": list(map(asdict, agreements))}
    return json.dumps(_plain(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Numbers to six places, and null for NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def as_markdown(read: Read, runs: Sequence[Run], agreements: Sequence[Agreement]) -> str:
    """Tables: each run's routers, agreement of runs, and each expert's tokens."""
    lines = [
        "# What the experts specialise in",
        "",
        f"{read.tokens:,} tokens of {read.source} (sha256 {read.identity[:12]}) in windows of {read.length:,}, "
        f"{read.vocabulary:,} different ones. Routing as in evaluation. By chance: {read.shuffles} shuffles of the "
        "experts over the tokens; +- is their standard deviation.",
        "",
        *summary(runs),
    ]
    for run in runs:
        if any(router.looks_ahead for router in run.routers.values()):
            lines += ["", f"{run.name}: {LOOKS_AHEAD}."]
    if agreements:
        lines += ["", "## Agreement between runs", "", *agreement_table(agreements)]
    for run in runs:
        for label, router in run.routers.items():
            lines += ["", f"## {run.name}, router {label}", "", *_experts(router)]
    return "\n".join(lines) + "\n"


def summary(runs: Sequence[Run]) -> Iterator[str]:
    """A line a router: the information of the expert about token and place, in bits."""
    yield (
        "| run | router | experts | entropy of the expert | token: information | by chance | of the entropy "
        "| place: information | by chance | of the entropy | tokens taken |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for run in runs:
        for label, router in run.routers.items():
            token, place = (_cells(measure, router.entropy) for measure in (router.token, router.position))
            yield (
                f"| {run.name} | {label} | {len(router.experts)} | {router.entropy:.3f} | {token} | {place} "
                f"| {router.taken:.1%} |"
            )


def _cells(measure: Measure, entropy: float) -> str:
    """Bits, those by chance, and what is above them as a share of the entropy."""
    share = f"{measure.beyond / entropy:.1%}" if entropy else "-"
    return f"{measure.value:.4f} | {measure.shuffled:.4f} +- {measure.spread:.4f} | {share}"


def agreement_table(agreements: Sequence[Agreement]) -> Iterator[str]:
    """A line a pair of runs and router: normalised mutual information of which expert takes a token."""
    yield "| runs | router | normalised mutual information | by chance | by chance among equal tokens |"
    yield "|---|---|---|---|---|"
    for one in agreements:
        for label, measure in one.routers.items():
            found = [f"{measure.value:.4f}"]
            found += [f"{m.shuffled:.4f} +- {m.spread:.4f}" for m in (measure, one.equal_tokens[label])]
            cells = "- | - | -" if math.isnan(measure.value) else " | ".join(found)
            yield f"| {one.runs[0]}, {one.runs[1]} | {label} | {cells} |"


def _experts(router: RouterFindings) -> Iterator[str]:
    """A line an expert: its load, and the tokens that it gets beyond chance."""
    yield "| expert | load | of it tokens beyond chance | tokens by lift (count, lift) |"
    yield "|---|---|---|---|"
    for expert in router.experts:
        words = " ".join(f"`{quoted(word.text)}` ({word.count:,}, {word.lift:.1f})" for word in expert.words)
        yield f"| {expert.number} | {expert.load:.1%} | {expert.special:.0%} | {words or '-'} |"


def quoted(text: str) -> str:
    """A token's text as it can stand between backticks in a table: spaces seen, control characters escaped."""
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return text.replace(" ", "\u2423").replace("`", "\u02cb").replace("|", "\\|")
