"""The built-in corpus: the English that every CPython carries.

The language reference (pydoc_data.topics, one document a topic) and the docstrings of the standard library (one
document a module), read from its source files, which are parsed and never imported. No download, the same
documents on every machine with the same Python.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

SPLITS = ("train", "validation")
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
SMALLEST_DOCUMENT = 40  # characters
QUOTED_PARAGRAPH = 60  # characters; shorter paragraphs recur by chance
VALIDATION_SHARE = 16  # one document in so many
SPLIT_BYTE = 3  # of the hash of its name: this one gives validation as many topics, by length, as there are in all

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def builtin_documents(split: str) -> tuple[str, ...]:
    """The documents of ``train`` or ``validation``, in a fixed order."""
    return _corpus()[split]


@lru_cache(maxsize=1)
def _corpus() -> dict[str, tuple[str, ...]]:
    """Split -> documents. Only the name decides the split, so that new documents move no old one."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in sorted((_topics() | _modules()).items()):
        digest = hashlib.sha256(name.encode()).digest()
        splits[SPLITS[digest[SPLIT_BYTE] % VALIDATION_SHARE == 0]].append(text)
    return {split: tuple(texts) for split, texts in splits.items()}


def _topics() -> dict[str, str]:
    """The language reference; without the topics that longer ones quote, which would stand in both splits."""
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) >= QUOTED_PARAGRAPH]
        quoted = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * quoted < sum(map(len, paragraphs)):
            kept[f"topics/{name}"] = text.strip("\n") + "\n"
            seen.update(paragraphs)
    return kept


def _modules() -> dict[str, str]:
    """Path of a module in the standard library -> its docstrings, in the order of the source."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            text = "\n\n".join(_docstrings(path.read_bytes()))
            if len(text) >= SMALLEST_DOCUMENT:
                found[relative.as_posix()] = text + "\n"
    return found


def _docstrings(source: bytes) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in some modules of the library
            tree = ast.parse(source)
    except SyntaxError:  # the library carries a few Python 2 files and templates
        return
    yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, Node):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings_below(child)
