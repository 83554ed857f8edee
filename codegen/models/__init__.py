"""Shapes of models: presets, Hugging Face configs, shards of a rank."""
