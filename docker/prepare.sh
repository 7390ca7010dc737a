#!/bin/sh
# What a builder needs of the system: a compiler for the C++ kernels, and tini, which the images start with.
set -eu
apt-get update
apt-get install -y --no-install-recommends g++ python3-venv tini
rm -rf /var/lib/apt/lists/*
