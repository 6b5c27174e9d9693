"""One folder a service; none of them imports another."""
