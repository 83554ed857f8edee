"""Which experts tokens go to: drawn or recorded, and the order of their rows."""
