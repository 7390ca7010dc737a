"""What tools/benchmark.py measures, a file for each large row, and how pairs are taken."""
