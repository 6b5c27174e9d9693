"""Alembic's revisions of ``shared.db.tables``, and what its command line needs to write more."""
