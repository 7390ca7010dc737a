"""What GPUs can do at most, by their makers' data sheets."""

import re

import torch

TERA = 1e12
# Words of a name -> floating-point operations a second of dense matrix products, in units of 10^12: bf16 with fp32
# sums, and fp32 without TF32, which nothing here turns on. The first line whose words are all in a name counts.
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H800": (989, 67),
    "H20": (148, 44),
    "GH200": (989, 67),
    "B200": (2250, 75),
    "GB200": (2500, 80),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165, 10.3),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
}
OTHERS = {"MIG", "Laptop", "D"}  # a part of a GPU, and slower ones of nearly the same name


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second of dense products in ``dtype``, bf16 or fp32; None where it is not known.

    Args:
        name: as ``torch.cuda.get_device_name`` says it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: that a model is trained in.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if words & OTHERS:
        return None
    for known, (bf16, fp32) in PEAKS.items():
        if words.issuperset(known.split()):
            return TERA * {torch.bfloat16: bf16, torch.float32: fp32}[dtype]
    return None
