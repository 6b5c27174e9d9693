"""The tables. A change here needs a migration beside it (``docs/state.md``); a test compares them.

Times are aware and UTC, durations seconds unless their name says milliseconds. A tenant is named
where a row outlives it (log, jobs, files) and referred to where it does not (keys); the tenant of
callers without a key is the one without a name.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import JSON, TypeDecorator

ID_LENGTH = 64
NAME_LENGTH = 64
LONG_NAME_LENGTH = 256
ERROR_LENGTH = 500


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime; comes back in UTC whatever the database keeps.

    A naive one raises ``ValueError``, which SQLAlchemy wraps in its ``StatementError``.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """SQLite has no time zones: it gets the UTC time without one."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Always aware, always UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    """The time of this host, aware."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables; constraints have names by rule, so that a migration can name them too."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it from the class)
        datetime: UtcDateTime(),
        float: Double(),
        dict[str, Any]: JSON().with_variant(JSONB(), "postgresql"),
    }


class Tenant(Base):
    """Who keys belong to. A quota of ``None`` is no limit."""

    __tablename__ = "tenants"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), unique=True)
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class ApiKey(Base):
    """A key, without its secret: ``id`` is the public part of its text, the rest only a hash."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(LONG_NAME_LENGTH))
    secret_sha256: Mapped[bytes] = mapped_column(LargeBinary(32))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class RequestRow(Base):
    """A request that has ended: one choice of a call, as its gateway saw it.

    ``request_id`` is the call's id, with ``-<index>`` behind it where the call has several choices.
    Times begin at ``received_at``, when the gateway had read and tokenised the call. ``ttft_s`` is
    ``None`` without a token, ``tpot_s`` with fewer than two. ``error_code`` is what the client was
    told. Whether an SLO was met is ``None`` where none was asked for, or the client left before
    that could be seen.
    """

    __tablename__ = "requests"

    request_id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    client_request_id: Mapped[str | None] = mapped_column(String(128))
    num_attempts: Mapped[int]
    tenant: Mapped[str] = mapped_column(String(NAME_LENGTH))
    key_id: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    gateway: Mapped[str] = mapped_column(String(128))
    model: Mapped[str] = mapped_column(String(LONG_NAME_LENGTH))
    api: Mapped[str] = mapped_column(String(16))
    is_stream: Mapped[bool]
    priority: Mapped[int]
    received_at: Mapped[datetime] = mapped_column(index=True)
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    output_tokens: Mapped[int]
    max_tokens: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    error_code: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[str | None] = mapped_column(String(ERROR_LENGTH))
    ttft_s: Mapped[float | None]
    tpot_s: Mapped[float | None]
    e2e_s: Mapped[float]
    slo_ttft_ms: Mapped[float | None]
    slo_tpot_ms: Mapped[float | None]
    slo_e2e_ms: Mapped[float | None]
    is_ttft_met: Mapped[bool | None]
    is_tpot_met: Mapped[bool | None]
    is_e2e_met: Mapped[bool | None]
    prompt: Mapped[str | None] = mapped_column(Text)
    """Only with the gateway's setting ``log_prompts``."""

    __table_args__ = (Index(None, "tenant", "received_at"),)


class File(Base):
    """A file of the OpenAI API; its bytes are in ``FilePart``, where every gateway finds them."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(NAME_LENGTH))
    filename: Mapped[str] = mapped_column(String(LONG_NAME_LENGTH))
    purpose: Mapped[str] = mapped_column(String(32))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]

    __table_args__ = (Index(None, "tenant", "created_at"),)


class FilePart(Base):
    """Some consecutive bytes of a file, so that neither side ever holds all of a large one."""

    __tablename__ = "file_parts"

    file_id: Mapped[str] = mapped_column(
        ForeignKey("files.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class BatchJob(Base):
    """A job of the OpenAI batch API; the columns are those of its batch object."""

    __tablename__ = "batch_jobs"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(NAME_LENGTH))
    endpoint: Mapped[str] = mapped_column(String(64))
    completion_window: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16), index=True)
    input_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"))
    output_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"))
    error_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"))
    errors: Mapped[dict[str, Any] | None]
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    num_total: Mapped[int] = mapped_column(default=0)
    num_completed: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]

    __table_args__ = (Index(None, "tenant", "created_at"),)


class Placement(Base):
    """Where the layers of a model were put; ``version`` grows by one with each."""

    __tablename__ = "placements"

    model: Mapped[str] = mapped_column(String(LONG_NAME_LENGTH), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    json: Mapped[dict[str, Any]]
