"""Shared by all tests. Its place also puts this directory on the import path, for the sample builders beside it."""
