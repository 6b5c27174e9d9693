"""Settings of the scheduler (``BANYAN_SCHEDULER_…``)."""

from typing import ClassVar

from pydantic import Field

from shared.config import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """What the scheduler can be told."""

    service: ClassVar[str] = "scheduler"

    policy: str = "fifo"
    """Batching policy, by the names of ``shared.core.policies.POLICIES``."""
    max_queued_requests: int = Field(default=4096, gt=0)
    """More waiting requests than this are refused with 429."""
    retry_after_s: float = Field(default=1.0, gt=0)
    """What a refused caller is told to wait."""
    max_batches: int = Field(default=2, gt=0)
    """Batches that may wait at one prefill instance; the rest stay here, where order can change."""
    max_batched_tokens: int = Field(default=4096, gt=0)
    max_batch_requests: int = Field(default=16, gt=0)

    instance_ttl_s: float = Field(default=2.0, gt=0)
    """An instance silent for this long is dead."""
    lease_ttl_s: float = Field(default=2.0, ge=1.0)
    listen_s: float = Field(default=0.5, ge=0)
    """How long a scheduler that has just started listens to reports before it may dispatch."""
    takeover_s: float = Field(default=1.0, gt=0)
    """How long a new leader waits for the workers' snapshots."""
    command_timeout_s: float = Field(default=5.0, gt=0)
    reservation_ttl_s: float = Field(default=60.0, gt=0)
    """A reservation whose KV has not arrived by then is freed."""
    retry_s: float = Field(default=0.05, gt=0)
    """Pause before a request that found no free blocks is tried again."""
    patience_s: float = Field(default=0.2, gt=0)
    """How long requests of a batch wait for the reservations of others, once theirs are answered;
    longer than a step of a healthy decode worker."""
    avoid_s: float = Field(default=10.0, ge=0)
    """How long a decode worker that does not answer is taken only if there is no other."""
    audit_period_s: float = Field(default=5.0, gt=0)

    predict_timeout_s: float = Field(default=1.0, gt=0)
    max_predictions_in_flight: int = Field(default=32, gt=0)
    max_predictions_waiting: int = Field(default=1024, gt=0)
