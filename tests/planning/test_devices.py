import pytest
import torch

from moe_mamba.planning.devices import peak_flops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_gpus_by_the_names_that_they_give_themselves(name: str, bf16: float) -> None:
    assert peak_flops(name, torch.bfloat16) == bf16 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",  # not half of an L40S's name
        "NVIDIA A10",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a part of one
        "AMD Instinct MI300X",
        "",
    ],
)
def test_others_are_not_known(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_fp32_is_not_the_rate_of_the_matrix_units() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) == 67e12
