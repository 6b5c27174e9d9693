"""One module a revision; ``upgrade(op)`` is given Alembic's operations."""
