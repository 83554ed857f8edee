"""Constants of activations that a name alone does not define. Light to import, for the runtime needs them."""

from __future__ import annotations

CLAMPED_ALPHA, CLAMPED_LIMIT = 1.702, 7.0
"""Of ``swiglu_clamped``: gate * sigmoid(CLAMPED_ALPHA * gate) * (up + 1), after gate was clamped from above and up from
both sides to CLAMPED_LIMIT. As openai/gpt-oss publishes them (gpt_oss/torch/model.py, ``swiglu_limit`` in config.json).
"""
