"""MoE routing: which experts compute a token, and in which order rows are computed."""
