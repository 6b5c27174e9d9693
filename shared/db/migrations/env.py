"""What Alembic's command line runs to write a revision: compares the tables with the revisions.

It needs no database: the revisions so far are applied to one in memory. No service runs this.
"""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, create_engine

from shared.db.migrate import Migrations
from shared.db.tables import Base, UtcDateTime


def render_item(kind: str, item: Any, autogen_context: AutogenContext) -> str | Literal[False]:
    """A revision names the types of the database, not ours."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):  # Alembic's own words for it lack an import
        autogen_context.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    return False


with create_engine("sqlite://").connect() as connection:
    Migrations().upgrade(connection)
    context.configure(connection, target_metadata=Base.metadata, render_item=render_item)
    with context.begin_transaction():
        context.run_migrations()
