"""One training step of one rank of a large world, on a machine without that world."""
