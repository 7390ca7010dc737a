"""Fixtures of the tests of conversion."""

from tests.hf.conftest import pair

__all__ = ["pair"]
