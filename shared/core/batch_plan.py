"""Which tokens of which requests are computed together: the choice of one iteration.

Iteration-level batching as in Orca (Yu et al., OSDI 2022, section 3), paged KV and preemption by
recompute as in vLLM (Kwon et al., SOSP 2023, section 4.5), chunked prefills that never stall
decodes as in Sarathi-Serve (Agrawal et al., OSDI 2024, section 4). Deviations: the blocks of a
whole prompt are taken at admission, and one order decides admission and preemption alike.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineEvent, EngineRequest, EngineState
from shared.core.request import RequestKey

OrderKey = Callable[[EngineRequest, float], Any]
"""``(request, now_s)`` to something sortable: smaller is admitted sooner and preempted later."""

WATERMARK_FRACTION = 0.01
"""Share of the pool an admission leaves free for the growth of what runs already."""


def first_come_first_served(request: EngineRequest, now_s: float) -> tuple[int, int]:
    """The default order: by priority, then by arrival."""
    return request.request.priority, request.arrival


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationLimits:
    """What a batch and a request may grow to."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens ``[start, end)`` of one request, to be computed in this iteration.

    ``is_sampling``: they reach the last token, so its logits give the next one. ``block_table`` is
    a live view that stays as it is until ``commit``.
    """

    request: EngineRequest
    start: int
    end: int
    is_sampling: bool
    block_table: Sequence[int]

    @property
    def key(self) -> RequestKey:
        """The request's identity."""
        return self.request.key

    @property
    def is_decode(self) -> bool:
        """Whether this is a single token behind output that was generated before."""
        return self.end - self.start == 1 and self.request.num_output_tokens > 0

    def export_range(self, block_size: int) -> tuple[int, int]:
        """Blocks ``[lo, hi)`` that this chunk makes ready for export: full ones, at last all."""
        done = self.request.num_exported_blocks
        if not self.request.is_exporting:
            return done, done
        hi = -(-self.end // block_size) if self.is_sampling else self.end // block_size
        return done, max(done, hi)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One iteration. ``block_copies`` (source, copy) come first, in this order."""

    chunks: tuple[Chunk, ...]
    block_copies: tuple[tuple[int, int], ...]
    preempted: tuple[RequestKey, ...]


class Planner:
    """Makes one plan; changes states and block tables of the requests as it goes."""

    def __init__(
        self,
        requests: Iterable[EngineRequest],
        blocks: BlockManager,
        limits: IterationLimits,
        *,
        order: Callable[[EngineRequest], Any],
        enable_prefix_cache: bool,
    ) -> None:
        live = list(requests)
        self._running = [r for r in live if r.state is EngineState.RUNNING]
        self._waiting = [r for r in live if r.state is EngineState.WAITING]
        self._blocks = blocks
        self._limits = limits
        self._order = order
        self._enable_prefix_cache = enable_prefix_cache
        self._budget = limits.max_num_batched_tokens
        self._chunks: dict[RequestKey, Chunk] = {}
        self._copies: list[tuple[int, int]] = []
        self._preempted: list[RequestKey] = []

    def plan(self) -> Plan:
        """The batch of this iteration; without chunks there is nothing that could run."""
        self._running.sort(key=self._order)
        by_need = sorted(self._running, key=lambda request: request.num_uncomputed_tokens > 1)
        for request in by_need:  # decodes first; the sort keeps the order otherwise
            if request.state is EngineState.RUNNING:  # not preempted meanwhile
                self._schedule(request)
        self._admit()
        return Plan(
            chunks=tuple(self._chunks.values()),
            block_copies=tuple(self._copies),
            preempted=tuple(self._preempted),
        )

    def _schedule(self, request: EngineRequest) -> None:
        """Give ``request`` what it needs of the remaining budget."""
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + self._budget)
        if end > start and self._make_room(request, end):
            self._budget -= end - start
            self._chunks[request.key] = Chunk(
                request=request,
                start=start,
                end=end,
                is_sampling=end == request.num_tokens,
                block_table=self._blocks.block_table(request.key),
            )

    def _admit(self) -> None:
        """Let waiting requests run, in order, as far as budget, seats and blocks reach."""
        is_blocked = False
        # What was preempted a moment ago would only take back the blocks just freed.
        if not self._waiting or self._preempted or not self._has_room():
            return
        for request in sorted(self._waiting, key=self._order):
            if not self._has_room() or self._preempted:
                return
            if not self._blocks.owns(request.key):
                # Nobody overtakes a request for want of blocks, but those that brought their own.
                is_blocked = is_blocked or not self._take_blocks(request)
                if is_blocked:
                    continue
            request.apply(EngineEvent.SCHEDULE)
            self._running.append(request)
            self._waiting.remove(request)
            self._schedule(request)

    def _has_room(self) -> bool:
        return self._budget > 0 and len(self._running) < self._limits.max_num_seqs

    def _take_blocks(self, request: EngineRequest) -> bool:
        """Allocate the blocks of all tokens, the cached prefix among them, if they are free."""
        size = self._blocks.block_size
        keys: Sequence[bytes] = ()
        if self._enable_prefix_cache:
            keys = request.full_block_keys(request.num_tokens - 1, size)
        num_hits, num_unowned = self._blocks.count_cached(keys)
        needed = self._blocks.blocks_for(request.num_tokens) - num_hits
        watermark = math.ceil(self._blocks.num_blocks * WATERMARK_FRACTION) if self._running else 0
        if self._blocks.num_free_blocks - num_unowned - needed < watermark:
            return False
        self._blocks.create(request.key)
        self._blocks.adopt(request.key, keys)
        self._blocks.allocate(request.key, needed)
        request.num_computed_tokens = num_hits * size
        request.num_registered_blocks = num_hits
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached_tokens = request.num_computed_tokens
        return True

    def _make_room(self, request: EngineRequest, end: int) -> bool:
        """Make the blocks of the tokens up to ``end`` exist and writable.

        Preempts from the end of the order until they fit; ``False`` if that hit ``request``.
        """
        blocks, key = self._blocks, request.key
        first = request.num_computed_tokens // blocks.block_size
        stop = blocks.blocks_for(end)
        size = len(blocks.block_table(key))
        while True:
            shared = sum(blocks.is_shared(key, i) for i in range(first, min(stop, size)))
            if max(0, stop - size) + shared <= blocks.num_free_blocks:
                break
            victim = max(self._holders(), key=self._order)
            self._preempt(victim)
            if victim is request:
                return False
        blocks.allocate(key, max(0, stop - size))
        for index in range(first, min(stop, size)):
            copy = blocks.make_writable(key, index)
            if copy is not None:
                self._copies.append(copy)
        return True

    def _holders(self) -> list[EngineRequest]:
        """Requests whose blocks can be taken away."""
        return [*self._running, *(r for r in self._waiting if self._blocks.owns(r.key))]

    def _preempt(self, victim: EngineRequest) -> None:
        """Take all blocks of ``victim``, which waits for its recomputation."""
        if victim.state is EngineState.RUNNING:
            self._running.remove(victim)
            self._waiting.append(victim)
        victim.apply(EngineEvent.PREEMPT)
        self._blocks.free(victim.key)
        victim.rewind(0, self._blocks.block_size)
        victim.num_preemptions += 1
        self._preempted.append(victim.key)
        chunk = self._chunks.pop(victim.key, None)
        if chunk is not None:
            self._budget += chunk.end - chunk.start
