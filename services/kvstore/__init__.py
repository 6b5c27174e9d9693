"""The global KV store: content-addressed, immutable KV blocks in host memory."""
