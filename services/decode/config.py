"""Settings of a decode worker (``BANYAN_DECODE_…``)."""

from typing import ClassVar

from shared.worker.config import WorkerSettings


class DecodeSettings(WorkerSettings):
    """A worker in the decode role."""

    service: ClassVar[str] = "decode"
