"""Other engines under the same loop and workloads; each runs in an environment of its own."""
