"""Filling prefill slots from an ordered queue, for policies that only order it."""

from collections.abc import Iterable

from shared.core.policies.base import Capacity, PrefillBatch, QueuedRequest


def pack_in_order(
    ordered: Iterable[QueuedRequest], capacity: Capacity, *, reason: str
) -> list[PrefillBatch]:
    """Give each slot the next requests of ``ordered`` that fit, without overtaking.

    A batch is closed when the next request would exceed the slot's tokens or requests; the first
    one of a batch is always taken, however long, since prefill is chunked. Packing stops for good
    at the first request whose blocks are not free: letting shorter ones pass it could starve it.
    """
    queue = iter(ordered)
    current = next(queue, None)
    free_blocks = capacity.free_decode_blocks
    batches: list[PrefillBatch] = []
    for slot in capacity.slots:
        taken: list[QueuedRequest] = []
        num_tokens = 0
        while current is not None and len(taken) < slot.max_requests:
            blocks = capacity.blocks_for(current.request)
            too_long = num_tokens + current.request.num_tokens > slot.max_batched_tokens
            if blocks > free_blocks or (taken and too_long):
                break
            taken.append(current)
            num_tokens += current.request.num_tokens
            free_blocks -= blocks
            current = next(queue, None)
        if not taken:
            break
        batches.append(PrefillBatch(instance=slot.instance, requests=tuple(taken), reason=reason))
    return batches
