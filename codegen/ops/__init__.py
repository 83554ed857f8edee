"""Ops: one package each, declared once, loaded when it is asked for (``registry``)."""
