"""Triton for NVIDIA and AMD GPUs, compiled to cubin and hsaco without a GPU."""
