"""Child processes: how they are started, confined and ended."""
