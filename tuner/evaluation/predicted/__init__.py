"""GPU kernels judged by what their binaries say."""
