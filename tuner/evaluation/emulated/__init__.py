"""GPU kernels checked in Triton's interpreter, without a GPU."""
