"""The decode role of a worker."""
