"""Load-aware routing: which worker prefills, which decodes (BanaServe, arXiv 2510.13223).

With prefill and decode both present every request crosses from one to the other. If one role has no
instance left, those of the other serve both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.cluster import Worker
from shared.core.policies import Capacity, PrefillSlot

UTILISATION_STEP = 0.1
"""Utilisations closer than this are taken as equal: below it a report is noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingLimits:
    """How much a prefill instance is given at a time."""

    max_batches: int = 2
    max_batched_tokens: int = 4096
    max_requests: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Pools:
    """Who prefills and who decodes now. ``is_disaggregated`` is false when they are the same."""

    prefill: tuple[Worker, ...]
    decode: tuple[Worker, ...]
    is_disaggregated: bool


def load_key(worker: Worker) -> tuple[int, int, str]:
    """Order of preference: least utilised first, ties by what it was given, then by name."""
    return (
        round(worker.utilisation / UTILISATION_STEP),
        worker.num_assigned,
        worker.instance,
    )


def divide(workers: Sequence[Worker]) -> Pools:
    """Split the ready workers into those that prefill and those that decode."""
    ready = [w for w in workers if w.is_ready]
    prefill = tuple(w for w in ready if w.report.role == "prefill")
    decode = tuple(w for w in ready if w.report.role == "decode")
    if prefill and decode:
        return Pools(prefill=prefill, decode=decode, is_disaggregated=True)
    either = prefill or decode
    return Pools(prefill=either, decode=either, is_disaggregated=False)


def capacity_of(pools: Pools, limits: RoutingLimits) -> Capacity:
    """What a policy may start now: one slot for each batch an instance can still take."""
    ranked = sorted(pools.prefill, key=lambda w: (w.num_batches, load_key(w)))
    slots = [
        (w.num_batches + taken, rank, w.instance)
        for rank, w in enumerate(ranked)
        for taken in range(limits.max_batches - w.num_batches)
    ]
    block_size = max((w.report.block_size for w in pools.decode), default=1)
    return Capacity(
        slots=tuple(
            PrefillSlot(
                instance=instance,
                max_batched_tokens=limits.max_batched_tokens,
                max_requests=limits.max_requests,
            )
            for _, _, instance in sorted(slots)
        ),
        free_decode_blocks=sum(w.free_blocks for w in pools.decode),
        block_size=block_size,
        pool_blocks=max((w.report.num_blocks for w in pools.decode), default=0),
    )


def choose_decode(pools: Pools, *, num_blocks: int, kv_layout: str) -> Worker | None:
    """The least loaded decode worker that shares ``kv_layout`` and has ``num_blocks`` free."""
    fitting = [
        w for w in pools.decode if w.free_blocks >= num_blocks and w.report.kv_layout == kv_layout
    ]
    return min(fitting, key=load_key, default=None)
