"""Jinja templates only; no Python logic lives here."""
