"""moe_mamba: training of MoE-Mamba language models, from one CPU or GPU to a cluster."""
