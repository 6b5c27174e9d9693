"""The resource profiler: how long a request's output will be, as a distribution."""
