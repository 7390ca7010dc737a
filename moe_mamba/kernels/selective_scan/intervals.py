"""Sizes by which the scans' back ends work: what they keep follows, and planning counts it without loading them."""

CHUNK = 16  # time steps from one kept state to the next, of torch and C++ (STEPS there)
GROUP = 128  # channels of a task of C++ (GROUP there): the gradients of B and C are a partial sum for each
INTERVAL = 32  # time steps from one kept state to the next, of Triton
BLOCK = 32  # channels of a program of Triton: the gradients of B and C are a partial sum for each
