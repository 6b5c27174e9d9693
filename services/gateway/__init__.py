"""HTTP in, token streams out; owner of each request until its end."""
