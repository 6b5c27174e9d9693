"""The inference engine: a transformers model as a chain of layers, paged KV, one thread."""
