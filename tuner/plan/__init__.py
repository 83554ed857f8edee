"""From trials to a plan: what its kernels share, last races, crossings, probes."""
