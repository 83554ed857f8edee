"""Child processes: started, confined, asked over one wire format, and ended. What they do is a job's own."""
