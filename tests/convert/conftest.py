"""What tests of conversion share with those of the class that Transformers loads."""

from tests.hf.conftest import pair

__all__ = ["pair"]
