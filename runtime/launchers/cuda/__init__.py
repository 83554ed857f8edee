"""GPU binaries of NVIDIA's (``cubin``) through the CUDA driver alone: no toolkit, no compiler, no Triton."""
