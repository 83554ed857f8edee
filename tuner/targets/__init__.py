"""What can be tuned for: one module each, found by an arch."""
