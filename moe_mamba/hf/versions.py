"""Versions of Transformers that exported models, and the class that loads them, are tested with."""

TESTED = ("4.57.6", "5.0.0", "5.10.4", "5.20.2", "5.23.0", "5.24.0")
OLDEST, NEWEST = "4.57", "5.24"  # minor versions; an older one is refused, a newer one has not been tried
