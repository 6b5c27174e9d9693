"""Queue, routing and placing of requests; one scheduler leads, others stand by."""
