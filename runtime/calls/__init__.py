"""A bound call: checked, picked by size, launched; in C and as its twin in Python."""
