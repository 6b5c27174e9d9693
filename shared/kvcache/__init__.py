"""Layout and pool of KV tensors; the bytes behind the block ids of ``shared.core``."""
