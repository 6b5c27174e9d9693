"""Pure decisions and bookkeeping: standard library only, no I/O, time and randomness passed in."""
