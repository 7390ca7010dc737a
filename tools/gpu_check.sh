#!/usr/bin/env bash
# One command for a machine with a GPU, under 9 minutes: every kernel test on the device, the benchmark's GPU rows, a
# real training run and a profile of a step. It writes gpu_check.md and gpu_check.json into docs/measurements, or into
# $OUT. What is not installed is skipped; a section that fails is reported, and the exit code is then 1. No setting of
# the GPU is changed. `tools/gpu_check.sh --help` lists the flags; `--device=cpu --tiny` tries it without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/tools:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_check "$@"
