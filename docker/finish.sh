#!/bin/sh
# What an image runs: the C++ kernels for named levels of processors, and Python's bytecode, which nobody can write later.
set -eu
export PATH="/opt/venv/bin:$PATH"
python tools/build_kernels.py --output=moe_mamba/kernels/prebuilt
python -m compileall -q moe_mamba launch tools
chmod -R a+rX /workspace /opt/venv  # a checkout may be its owner's alone
