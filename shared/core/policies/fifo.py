"""First come, first served: the baseline that every other policy is compared with."""

from shared.core.policies.base import Capacity, Policy, PrefillBatch, QueuedRequest
from shared.core.policies.packing import pack_in_order


class FifoPolicy(Policy):
    """Requests leave in order of arrival; a request that came back keeps its place."""

    name = "fifo"

    def next_prefill_batches(self, now_s: float, capacity: Capacity) -> list[PrefillBatch]:
        """The oldest requests that fit, at most one batch a slot."""
        if not capacity.slots or not self._waiting:
            return []
        ordered = sorted(self._waiting.values(), key=lambda q: (q.arrival_s, q.key))
        batches = pack_in_order(ordered, capacity, reason="oldest first")
        for batch in batches:
            for queued in batch.requests:
                del self._waiting[queued.key]
        return batches

    def decode_key(self, queued: QueuedRequest, now_s: float) -> tuple[float, ...]:
        """Older requests are admitted first and preempted last."""
        return (queued.arrival_s,)
