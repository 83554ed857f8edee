"""Attention: decoding against a paged cache, and prefill of packed prompts."""
