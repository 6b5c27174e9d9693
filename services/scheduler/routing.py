"""Load-aware routing: which worker prefills, which decodes (BanaServe, arXiv 2510.13223).

With prefill and decode both present every request crosses from one to the other. If one role has no
instance left, those of the other serve both.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from services.scheduler.cluster import Worker
from shared.core.policies import Capacity, PrefillBatch, PrefillSlot

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


def beside_siblings(
    batches: Sequence[PrefillBatch], pools: Pools, capacity: Capacity, homes: Mapping[str, str]
) -> list[PrefillBatch]:
    """Send batches where siblings of theirs are prefilled, so that one prefill does for all.

    ``homes`` has that instance by group. A batch goes there only if ``capacity`` has a slot left
    and it has no more batches yet than there are, with this one, where the policy has put it.
    """
    known = dict(homes)
    num_slots = Counter(slot.instance for slot in capacity.slots)
    num_slots.subtract(batch.instance for batch in batches)
    num_batches = Counter({worker.instance: worker.num_batches for worker in pools.prefill})
    num_batches.update(batch.instance for batch in batches)
    routed = []
    for batch in batches:
        groups = [q.request.group_id for q in batch.requests if q.request.group_id is not None]
        instance = batch.instance
        home = next((known[group] for group in groups if group in known), instance)
        is_free = num_slots[home] > 0 and num_batches[home] <= num_batches[instance]
        if home != instance and is_free:
            num_slots.update({instance: 1, home: -1})
            num_batches.update({instance: -1, home: 1})
            instance = home
        for group in groups:
            known.setdefault(group, instance)
        routed.append(replace(batch, instance=instance))
    return routed


def choose_decode(
    pools: Pools, *, num_blocks: int, kv_layout: str, avoided: Collection[str] = ()
) -> Worker | None:
    """The least loaded decode worker that shares ``kv_layout`` and has ``num_blocks`` free.

    Those ``avoided`` are taken if there is no other.
    """
    fitting = [
        w for w in pools.decode if w.free_blocks >= num_blocks and w.report.kv_layout == kv_layout
    ]
    return min(fitting, key=lambda w: (w.instance in avoided, load_key(w)), default=None)
