"""A table's numbers in words: ours beside the paper's, the sweep, the trend, the protocol."""

import json
from collections.abc import Callable
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.reproduce.document import Grid, Heading, Paragraph, Part, Picture, to_html, to_markdown
from moe_mamba.reproduce.experiment import Figures, Table
from moe_mamba.reproduce.gathering import Result, RowResult, over_tokens, to_json
from moe_mamba.reproduce.pictures import draw_axis, draw_tokens
from moe_mamba.reproduce.statistics import Difference, Mean, crossing, mean

SHARES = (0.25, 0.5, 0.75, 1.0)
NONE, UNPUBLISHED = "-", "not published"


def write_report(result: Result) -> list[Path]:
    """Write table.md, table.json, report.html and the pictures; the files."""
    workspace = result.workspace
    folder = workspace.output / workspace.table.label
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, draw, text in (
        ("tokens.png", draw_tokens, "Validation loss over tokens; line: mean of the seeds, band: lowest to highest"),
        ("axis.png", draw_axis, f"Loss over {workspace.table.experiment.axis}; bars: standard error over seeds"),
    ):
        if draw(result, folder / name):
            pictures.append(Picture(folder / name, text))
    parts = describe(result, pictures)
    title = f"{workspace.table.name}, {workspace.table.version}, {workspace.table.scale} scale"
    files = {
        "table.md": to_markdown(parts),
        "table.json": json.dumps(to_json(result), indent=1) + "\n",
        "report.html": to_html(title, parts),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files] + [picture.path for picture in pictures]


def describe(result: Result, pictures: list[Picture]) -> list[Part]:
    """The report, part by part."""
    table = result.workspace.table
    parts: list[Part] = [
        Heading(f"{table.experiment.title}: {table.scale} scale", 1),
        Paragraph(f"{_source(table)} Losses are in nats/token."),
        main_grid(result),
        Paragraph(items=[*_notes(result), *(f"Missing: {line}." for line in result.missing)]),
        *pictures,
    ]
    for title, grid in (
        ("The difference over tokens", trend_grid(result)),
        ("The learning rates", sweep_grid(result)),
        ("One rate for all, the reference's", one_rate_grid(result)),
    ):
        if grid is not None:
            parts += [Heading(title), grid]
    parts += [Heading("Protocol"), Paragraph(items=protocol(result))]
    if table.published.not_published:
        parts += [Heading("What the paper leaves open"), Paragraph(items=table.published.not_published)]
    return parts


def _source(table: Table) -> str:
    source = table.published.source
    return f"The paper's figures: {source}." if table.published.published else f"Not in the paper: {source}."


def main_grid(result: Result) -> Grid:
    """The table itself."""
    table = result.workspace.table
    titles = {name: table.rows[table.reference_of(name)].title for name in table.rows}
    reference = titles[table.published.reference] if len(set(titles.values())) == 1 else "its reference"
    columns: list[tuple[str, Callable[[RowResult], str]]] = [
        ("model", lambda row: table.rows[row.name].title),
        ("parameters", lambda row: f"{row.counts['total']:,}"),
        ("active", lambda row: f"{row.counts['active']:,}"),
        ("peak rate", lambda row: NONE if row.rate is None else f"{row.rate:g}"),
        ("seeds", lambda row: str(len(row.traces))),
        ("loss", lambda row: "diverged" if row.diverged else _mean(row.loss, 4)),
        ("reference", lambda row: NONE if table.reference_of(row.name) == row.name else titles[row.name]),
        (f"difference to {reference} (95 % interval)", lambda row: _difference(row.difference, len(row.traces))),
        (f"steps to {reference}'s loss", lambda row: _steps(row)),
        ("fullest expert / mean", lambda row: _number(row.over_seeds("fullest"), 2)),
        ("dropped", lambda row: _percent(row.over_seeds("dropped"))),
        ("tokens/s", lambda row: _number(row.over_seeds("tokens_per_second"), 0)),
        ("paper: loss", lambda row: _published(result, row, lambda figures: _paper_loss(figures))),
        ("paper: difference", lambda row: _paper_difference(result, row)),
        ("paper: steps", lambda row: _paper_steps(result, row)),
    ]
    kept = [(name, cell) for name, cell in columns if name not in _empty_columns(result)]
    rows = [[cell(row) for _, cell in kept] for row in result.rows.values()]
    return Grid([name for name, _ in kept], rows)


def _empty_columns(result: Result) -> set[str]:
    """Columns that no row fills: of experts, where none has any, and of what the paper does not compare."""
    table, empty = result.workspace.table, set()
    if len({table.reference_of(name) for name in table.rows}) == 1:
        empty.add("reference")
    if all(row.over_seeds("fullest") is None for row in result.rows.values()):
        empty |= {"fullest expert / mean", "dropped"}
    published = table.published.published.values()
    if not any(figures.share or figures.speed_up for figures in published):
        empty.add("paper: steps")
    if not published:
        empty |= {"paper: loss", "paper: difference"}
    return empty


def _notes(result: Result) -> list[str]:
    table = result.workspace.table
    lines = [
        "Loss is the cross entropy of the validation text at the last step, by itself: no balance loss is in it. Mean "
        "and standard error over seeds; differences are of the same seed, with Student's t.",
        "Steps to a loss: where a run's validation loss, by straight lines between validations, first is at or below "
        "the final loss of the reference's run of the same seed, as a share of that run's steps. Nothing is smoothed.",
    ]
    if table.made.share < 1:
        few = "" if table.made.seeds > 1 else " and one seed, so without intervals"
        lines.append(f"An early look: {table.made.share:.0%} of the scale's tokens{few}.")
    lines += [f"{table.rows[name].title}: {table.rows[name].note}." for name in result.rows if table.rows[name].note]
    lines += table.made.notes
    if (place := _crossing(result)) is not None:
        lines.append(place)
    return lines + _order(result)


def _crossing(result: Result) -> str | None:
    """Where a series over the axis falls to the reference; nothing, where that is one of its points."""
    table = result.workspace.table
    if table.rows[table.published.reference].at is not None:
        return None
    points = [
        (at, row.difference.value)
        for name, row in result.rows.items()
        if (at := table.rows[name].at) is not None and row.difference is not None and not table.rows[name].series
    ]
    if len(points) < 2:
        return None
    place, name = crossing(sorted(points)), table.rows[table.published.reference].title
    if place is not None:
        where = f"crosses that of {name} at about {place:.3g} (straight lines over the logarithm)"
    elif min(points)[1] <= 0:
        where = f"is below that of {name} from the first on"
    else:
        where = f"does not reach that of {name}"
    return f"Over {table.experiment.axis}, the loss {where}."


def _order(result: Result) -> list[str]:
    """The order of the rows by loss, ours and the paper's."""
    table = result.workspace.table
    ours = {
        name: row.loss.value
        for name, row in result.rows.items()
        if row.loss and table.rows[name].compares and not row.diverged
    }
    paper = {name: figures.loss for name in ours if (figures := table.published.published.get(name)) and figures.loss}
    if len(paper) < 2:
        return []
    said = []
    for who, losses in (("Order here, of the means over all seeds,", ours), ("Order in the paper,", paper)):
        titles = "; ".join(table.rows[name].title for name in sorted(paper, key=losses.__getitem__))
        said.append(f"{who} from the lowest loss: {titles}.")
    return said


def trend_grid(result: Result) -> Grid | None:
    """Differences to the reference as training goes on."""
    table = result.workspace.table
    found = {}
    for name, row in result.rows.items():
        reference = result.rows.get(table.reference_of(name))
        if row.difference is not None and reference is not None:
            found[name] = over_tokens(row, reference, SHARES)
    places = sorted({tokens for differences in found.values() for tokens in differences})
    if not places:
        return None
    rows = [
        [table.rows[name].title, *(_difference(differences.get(place)) for place in places)]
        for name, differences in found.items()
    ]
    return Grid(["model", *(f"{place:,} tokens" for place in places)], rows)


def sweep_grid(result: Result) -> Grid | None:
    """What the sweep gave, and what was chosen."""
    table = result.workspace.table
    if table.made.sweep is None:
        return None
    rates = table.made.sweep.rates
    rows = []
    for name, row in result.rows.items():
        made = table.made.runs[name]
        if made.rate_of or made.rate is not None:
            whose = f"that of {table.rows[made.rate_of].title}" if made.rate_of else f"{made.rate:g}, given"
            rows.append([table.rows[name].title, *[NONE] * len(rates), whose])
            continue
        cells = [_swept(row, rate) for rate in rates]
        edge = " (an end of the grid)" if len(rates) > 1 and row.rate in (min(rates), max(rates)) else ""
        rows.append([table.rows[name].title, *cells, NONE if row.rate is None else f"{row.rate:g}{edge}"])
    return Grid(["model", *(f"{rate:g}" for rate in rates), "chosen"], rows)


def _swept(row: RowResult, rate: float) -> str:
    if rate not in row.swept:
        return NONE
    loss = row.swept[rate]
    return "diverged" if loss is None else f"{loss:.4f}"


def one_rate_grid(result: Result) -> Grid | None:
    """Losses at the reference's rate, of the rows whose own rate is another."""
    table = result.workspace.table
    rows = [
        [
            table.rows[name].title,
            f"{result.rows[table.reference_of(name)].rate:g}",
            str(len(row.one_rate)),
            _mean(row_mean, 4),
            _difference(row.one_rate_difference),
        ]
        for name, row in result.rows.items()
        if (row_mean := mean(list(row.one_rate.values()))) is not None
    ]
    header = ["model", "peak rate", "seeds", "loss", "difference to the reference (95 % interval)"]
    return Grid(header, rows) if rows else None


def protocol(result: Result) -> list[str]:
    """What was done, for who wants to repeat it."""
    table, text = result.workspace.table, result.workspace.text
    lines = []
    config = table.config(table.published.reference, {})
    train, length = config.train, config.data.sequence_length
    if text is not None:
        public = text.public()
        lines += [f"Text: {name}, sha256 {digest}." for name, digest in public["sha256"].items()]
        documents = [f" of {number:,} documents" for number in text.documents] or ["", ""]
        lines.append(
            f"Training on {text.tokens[0]:,} tokens{documents[0]}, validation on "
            f"{_validated(text.tokens[1], (train.validation_batches or 0) * train.global_batch * length)} tokens"
            f"{documents[1]}; split: {text.split}. Vocabulary: {public['vocabulary']}, {text.vocab_size:,} tokens."
        )
        if not any(text.asked.values()):
            lines.append("The built-in corpus is too small for claims: it shows that the tool works.")
    trace = next((trace for row in result.rows.values() for trace in row.traces.values()), None)
    if trace is not None:
        tokens = trace.steps * trace.tokens_per_step
        epochs = f", {tokens / text.tokens[0]:.2f} epochs" if text else ""
        lines.append(f"Each run: {trace.steps:,} steps of {trace.tokens_per_step:,} tokens, {tokens:,} in all{epochs}.")
    lines.append(
        f"AdamW ({train.beta1:g}, {train.beta2:g}), weight decay {train.weight_decay:g}, gradient clip "
        f"{train.gradient_clip:g}, {train.schedule} to {train.minimum_rate:g} of the peak after {train.warmup:.0%} "
        f"warm-up, {train.precision}; sequences of {length:,}."
    )
    if (sweep := table.made.sweep) is not None:
        but = ", save where it is given" if any(made.rate is not None for made in table.made.runs.values()) else ""
        lines.append(
            f"Learning rates: each model's own{but}, the best of {len(sweep.rates)} on seed {sweep.seed:,} with "
            f"{sweep.share:.0%} of the tokens and the schedule shrunk to them; the same budget for each model."
        )
    spent = ", ".join(f"{kind.replace('_', ' ')} {hours:.2f}" for kind, hours in result.hours.items())
    unit = "core" if trace is None or not _is_on_gpus(result) else "GPU"
    lines.append(
        f"{unit.capitalize()} hours, by the clock with one {unit} a run: {sum(result.hours.values()):.2f} ({spent})."
    )
    return lines + _made_with(result)


def _validated(tokens: int, read: int) -> str:
    """What runs validate on; ``read``: tokens that they would read, 0: all."""
    if not read:
        return f"all of {tokens:,}"
    return f"the first {read:,} of {tokens:,}" if read <= tokens else f"{tokens:,}, where {read:,} are wanted"


def _is_on_gpus(result: Result) -> bool:
    return any(maker.startswith("cuda") for maker in result.made_with)


def _made_with(result: Result) -> list[str]:
    """On what the runs were made, and with which libraries."""
    lines = [f"On {maker}: {count} runs." for maker, count in sorted(result.made_with.items()) if maker]
    if silent := result.made_with[""]:
        lines.append(f"{silent} runs did not note on what they were made.")
    return lines


def _published(result: Result, row: RowResult, words: Callable[[Figures], str]) -> str:
    figures = result.workspace.table.published.published.get(row.name)
    return UNPUBLISHED if figures is None else words(figures)


def _paper_loss(figures: Figures) -> str:
    return figures.text or (UNPUBLISHED if figures.loss is None else f"{figures.loss:.2f}")


def _paper_difference(result: Result, row: RowResult) -> str:
    published = result.workspace.table.published.published
    name = result.workspace.table.reference_of(row.name)
    if row.name == name:
        return NONE
    own, other = published.get(row.name), published.get(name)
    if own is None or other is None or own.loss is None or other.loss is None:
        return UNPUBLISHED
    return f"{own.loss - other.loss:+.2f}"


def _paper_steps(result: Result, row: RowResult) -> str:
    published = result.workspace.table.published.published
    figures, other = published.get(row.name), published.get(result.workspace.table.reference_of(row.name))
    if figures is None:
        return UNPUBLISHED
    if figures.share is None and figures.speed_up is None:
        never = figures.loss is not None and other is not None and other.loss is not None and figures.loss > other.loss
        return NONE if never else UNPUBLISHED
    share = figures.share or 1 / (figures.speed_up or 1)
    speed_up = figures.speed_up or 1 / share
    return f"{share:.0%}" + (f" ({speed_up:.3g}x fewer)" if speed_up != 1 else "")


def _steps(row: RowResult) -> str:
    if not row.shares:
        return NONE
    if row.share is None:
        never = sum(share is None for share in row.shares.values())
        return f"not reached by {never} of {len(row.shares)}"
    error = "" if row.share.error is None else f" ± {100 * row.share.error:.1f}"
    return f"{100 * row.share.value:.1f}{error} % ({1 / row.share.value:.2f}x)"


def _mean(value: Mean | None, digits: int) -> str:
    if value is None:
        return NONE
    return f"{value.value:.{digits}f}" + ("" if value.error is None else f" ± {value.error:.{digits}f}")


def _difference(value: Difference | None, seeds: int | None = None) -> str:
    """In words; how many seeds both have, where that is not all that the row has."""
    if value is None:
        return NONE
    if value.low is None or value.high is None:
        return f"{value.value:+.4f} (one seed)"
    pairs = "" if seeds in (None, value.seeds) else f"; {value.seeds} seeds"
    return f"{value.value:+.4f} ({value.low:+.4f} to {value.high:+.4f}{pairs})"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"
