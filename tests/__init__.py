"""Tests mirror the package's folders; they are a package, so that no folder hides one of the project's names."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
