"""Settings of the gateway (``BANYAN_GATEWAY_…``)."""

from typing import ClassVar, Literal

from pydantic import Field

from shared.config import BUNDLED_MODEL, ModelDirectory, ServiceSettings


class GatewaySettings(ServiceSettings):
    """What the gateway can be told."""

    service: ClassVar[str] = "gateway"
    model: ModelDirectory = str(BUNDLED_MODEL)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=8 * 1024 * 1024, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)

    accept_timeout_s: float = Field(default=10.0, gt=0)
    """How long a new request waits for a scheduler to take it before it is refused with 503."""
    submit_timeout_s: float = Field(default=2.0, gt=0)
    """Deadline of one submission or closing; it is repeated."""
    silence_s: float = Field(default=1.0, gt=0)
    """A request that was silent for this long is asked after."""
    gap_patience_s: float = Field(default=0.1, gt=0)
    """How long missing tokens may be late before they are asked for."""
    since_timeout_s: float = Field(default=0.5, gt=0)
    max_failures: int = Field(default=3, ge=0)
    """Attempts that workers may give up on before the request fails."""
    max_outage_s: float = Field(default=60.0, gt=0)
    """How long an accepted request outlives a suite without scheduler."""
    close_timeout_s: float = Field(default=30.0, gt=0)
    instance_ttl_s: float = Field(default=2.0, gt=0)

    require_keys: Literal["auto", "always", "never"] = "auto"
    """Whether requests need an API key; ``auto``: as soon as the database has one, for good."""
    key_period_s: float = Field(default=0.5, gt=0)
    """How often the database is asked whether keys were made or revoked."""

    request_log: bool = True
    """Whether requests that have ended are written to the database."""
    request_log_max_pending: int = Field(default=10_000, gt=0)
    """How many of them wait in memory while the database is away; what comes then is lost."""
    request_log_retention_days: float = Field(default=30.0, ge=0, le=36_500)
    """After how long they are deleted; 0 keeps them for ever."""
    log_prompts: bool = False
    """Whether the log has the text of the prompts."""
