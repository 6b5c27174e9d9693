"""Brings a database's schema to that of this version, over a connection in a transaction.

Alembic's revisions, without its ``env.py`` and its module-wide proxies: those would let two
databases in one process get into each other's way. A revision is told its operations instead,
``upgrade(op)``. There is no way back; who needs one restores a backup.
"""

import logging
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection

from shared.errors import DatabaseError

MIGRATIONS = Path(__file__).with_name("migrations")


class Migrations:
    """The revisions that travel with this package."""

    def __init__(self) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it narrates every look
        self._scripts = ScriptDirectory(str(MIGRATIONS))

    @property
    def head(self) -> str:
        """The revision that this version of the code works with."""
        head = self._scripts.get_current_head()
        assert head is not None, "the package has no migrations"
        return head

    def revision(self, connection: Connection) -> str | None:
        """What revision the database is at; ``None`` for one without our tables."""
        return MigrationContext.configure(connection).get_current_revision()

    def upgrade(self, connection: Connection) -> tuple[str, ...]:
        """Apply what is missing, in the connection's transaction; returns the revisions.

        Whoever calls it sees to it that nobody else does at the same time. Raises
        ``DatabaseError`` for a database that a newer version has upgraded.
        """
        context = MigrationContext.configure(connection)
        current = context.get_current_revision()
        try:
            missing = list(self._scripts.iterate_revisions("head", current))
        except (CommandError, RevisionError) as error:
            raise DatabaseError(
                f"the database is at revision {current}, which this version does not know: "
                f"it knows {self.head}; run the version that upgraded it, or a newer one"
            ) from error
        missing.reverse()
        for script in missing:
            script.module.upgrade(Operations(context))
            context.stamp(self._scripts, script.revision)
        return tuple(script.revision for script in missing)
