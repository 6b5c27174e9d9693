"""The worker around an engine: commands in, tokens and KV out. Prefill and decode are its roles."""
