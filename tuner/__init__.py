"""Search, measure, check, store: the tuning loop and its command line."""
