"""What is known of machines: instruction sets, GPUs on the market, the CPU at hand."""
