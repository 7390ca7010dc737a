#!/bin/sh
# build_vendor.sh CONSTRAINTS WHEELS: mamba-ssm and causal-conv1d for the GPUs that CUDA_ARCHITECTURES names, as wheels.
# Their setup.py names eight generations; nvcc takes minutes for each. Without these flags torch's builder asks
# TORCH_CUDA_ARCH_LIST.
set -eu
export TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES" MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
work=$(mktemp -d)
for name in causal-conv1d mamba-ssm; do
    pin=$(grep "^$name==" "$1")
    python3 -m pip download --no-cache-dir --no-deps --no-build-isolation --no-binary "$name" --dest "$work" "$pin"
done
mkdir -p "$2"
for archive in "$work"/*.tar.gz; do
    tar -xzf "$archive" -C "$work"
    source=${archive%.tar.gz}
    sed -i 's/cc_flag\.append("-gencode")/pass/; s/cc_flag\.append("arch=compute_[^"]*")/pass/' "$source/setup.py"
    python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$2" "$source"
done
rm -rf "$work"
