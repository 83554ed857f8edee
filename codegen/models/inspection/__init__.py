"""What a model is made of, read from its class in Transformers on the meta device: without weights or network."""
