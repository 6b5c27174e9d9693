"""``banyan``: starts the suite on one machine, talks to it, and shows how it is."""
