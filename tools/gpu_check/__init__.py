"""What tools/gpu_check.sh runs: sections, each a process with a time limit, and a report of them all."""
