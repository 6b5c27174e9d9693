"""Settings of a prefill worker (``BANYAN_PREFILL_…``)."""

from typing import ClassVar

from shared.worker.config import WorkerSettings


class PrefillSettings(WorkerSettings):
    """A worker in the prefill role."""

    service: ClassVar[str] = "prefill"
