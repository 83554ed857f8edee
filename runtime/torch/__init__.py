"""What the runtime adds to torch, and how it falls back to it."""
