"""A report as parts, written as Markdown and as one HTML file that needs no other."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1400px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto;
        font-size: .93em }
th, td { text-align: right; padding: .3em .55em; border-bottom: 1px solid #e5e7eb; vertical-align: top }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #9ca3af; font-weight: 600 }
img { max-width: 100% } code { background: #f3f4f6; padding: 0 .25em }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; ``items`` make it a list."""

    text: str = ""
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Grid:
    """A table; its first column is of names."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, with what it shows."""

    path: Path
    text: str


Part = Heading | Paragraph | Grid | Picture


def to_markdown(parts: Iterable[Part]) -> str:
    """The report as Markdown; pictures are links to files beside it."""
    return "\n\n".join(map(_markdown, parts)) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Picture):
        return f"![{part.text}]({part.path.name})"
    if isinstance(part, Grid):
        rule = ["---", *["---:"] * (len(part.header) - 1)]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (part.header, *part.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
    return "\n".join([*[part.text] * bool(part.text), *(f"- {item}" for item in part.items)])


def to_html(title: str, parts: Iterable[Part]) -> str:
    """The report as one HTML page, pictures inside."""
    body = "\n".join(map(_html, parts))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Picture):
        data = base64.b64encode(part.path.read_bytes()).decode()
        return f'<p><img alt="{html.escape(part.text)}" src="data:image/png;base64,{data}"></p>'
    if isinstance(part, Grid):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows)
        lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"
    items = "".join(f"<li>{html.escape(item)}</li>" for item in part.items)
    return (f"<p>{html.escape(part.text)}</p>" if part.text else "") + (f"<ul>{items}</ul>" if items else "")
