"""The tuning loop: from a request to trials, for every problem of a model."""
