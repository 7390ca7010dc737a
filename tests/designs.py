"""Patterns with mixtures inside their Mamba layers, as tests write them: ``M own``."""

from typing import Any

INNER: dict[str, dict[str, Any]] = {
    "own": {"projections": ["conv", "gate"]},
    "own top-2": {"projections": ["conv", "gate"], "top_k": 2},
    "shared": {"projections": ["conv", "gate", "out"], "router": "shared"},
    "shared top-2": {"projections": ["conv", "gate", "out"], "router": "shared", "top_k": 2},
    "switch": {"projections": ["conv", "gate", "out"], "expert": "switch", "d_expert": 12},
}


def split(pattern: str) -> tuple[str, dict[str, Any]]:
    """The pattern, and the keys of ``moe.inner``."""
    pattern, _, inner = pattern.partition(" ")
    return pattern, INNER[inner] if inner else {}
