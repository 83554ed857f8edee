"""One module per op; each declares everything that the rest of tilewright derives from it."""
