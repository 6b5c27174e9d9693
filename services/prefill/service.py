"""The prefill service: a worker (``shared.worker``) in the prefill role."""

from shared.worker.worker import WorkerService


class PrefillService(WorkerService):
    """Turns prompts into KV and a first token, and sends both on.

    The code of both roles is one and the same: where one role has no instance left, the other
    serves both.
    """
