"""The model: embeddings, residual blocks, attention layers, and the caches to decode with."""
