"""What outlives a process: tenants and keys, the request log, batch jobs and files, placements."""

from shared.db.database import Database
from shared.db.tables import (
    ApiKey,
    Base,
    BatchJob,
    File,
    FilePart,
    Placement,
    RequestRow,
    Tenant,
)

__all__ = [
    "ApiKey",
    "Base",
    "BatchJob",
    "Database",
    "File",
    "FilePart",
    "Placement",
    "RequestRow",
    "Tenant",
]
