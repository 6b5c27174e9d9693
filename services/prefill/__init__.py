"""The prefill role of a worker."""
