"""GPU kernels checked without a GPU: their rendered source runs in Triton's interpreter, against the op's reference."""
