"""The decode service: a worker (``shared.worker``) in the decode role."""

from shared.worker.worker import WorkerService


class DecodeService(WorkerService):
    """Takes over prefilled requests and generates the rest.

    The code of both roles is one and the same: where one role has no instance left, the other
    serves both.
    """
