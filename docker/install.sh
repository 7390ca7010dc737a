#!/bin/sh
# install.sh CONSTRAINTS: the libraries, and the checkout in /workspace as an editable package, in /opt/venv.
# EXTRAS names more of pyproject.toml's, such as evaluation,huggingface; TORCH_INDEX, where torch's builds lie.
set -eu
# What the base brings serves where its version is the constraints': torch for CUDA is 5 GB that are not there twice.
python3 -m venv --system-site-packages /opt/venv
/opt/venv/bin/pip install --no-cache-dir --constraint "$1" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    --editable ".${EXTRAS:+[$EXTRAS]}"
if ls /wheels/*.whl 2>/dev/null; then
    /opt/venv/bin/pip install --no-cache-dir --constraint "$1" /wheels/*.whl
fi
