"""Which tokens of which requests are computed together: the choice of one iteration.

Iteration-level batching as in Orca (Yu et al., OSDI 2022, section 3), paged KV and preemption as
in vLLM (Kwon et al., SOSP 2023, section 4.5), chunked prefills that never stall decodes as in
Sarathi-Serve (Agrawal et al., OSDI 2024, section 4). Deviations: the blocks of a whole prompt are
taken at admission, and one order decides admission and preemption alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineEvent, EngineRequest, EngineState
from shared.core.preemption import PreemptionKind, SwapSpace
from shared.core.request import RequestKey
from shared.core.request_table import RequestTable
from shared.core.siblings import awaits_sibling

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


class Chunk(NamedTuple):
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

    @property
    def completes_prompt(self) -> bool:
        """Whether the prompt has its KV when this is computed, and had not before."""
        return self.start < self.request.num_prompt_tokens <= self.end

    @property
    def is_due(self) -> bool:
        """Whether the request is still where it was, or expected to be, when this was planned.

        Not if it has ended or been rolled back since, nor if it got several tokens where one was
        reckoned with: then the token that this samples is known.
        """
        request = self.request
        return (
            request.state is EngineState.RUNNING
            and self.start == request.num_computed_tokens
            and (not self.is_sampling or self.end == len(request.token_ids))
        )

    @property
    def is_last(self) -> bool:
        """Whether the token that it samples is the last one here, whichever it is."""
        request = self.request
        return request.prefill_only or self.end + 1 >= request.max_num_tokens

    def export_range(self, block_size: int) -> tuple[int, int]:
        """Blocks ``[lo, hi)`` that this chunk makes ready for export: full ones, at last all."""
        done = self.request.num_exported_blocks
        if not self.request.is_exporting:
            return done, done
        hi = -(-self.end // block_size) if self.is_sampling else self.end // block_size
        return done, max(done, hi)


class Plan(NamedTuple):
    """One iteration.

    Blocks are copied before anything is computed, in this order: ``swap_out`` (block, host block),
    ``block_copies`` (source, copy) one after the other, ``swap_in`` (host block, block). A plan
    without chunks may have copies to make. ``pad_chunks`` are computed like ``chunks``, but nothing
    is sampled from them and ``commit`` passes them over; their requests are known to nobody.
    """

    chunks: tuple[Chunk, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[tuple[RequestKey, PreemptionKind], ...] = ()
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    pad_chunks: tuple[Chunk, ...] = ()

    @property
    def computed(self) -> tuple[Chunk, ...]:
        """All that is to be computed, padding included."""
        return self.chunks + self.pad_chunks


class Draft:
    """A plan in the making."""

    __slots__ = ("budget", "chunks", "copies", "pad_chunks", "preempted", "swap_in", "swap_out")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.copies: dict[RequestKey, list[tuple[int, int]]] = {}
        self.preempted: list[tuple[RequestKey, PreemptionKind]] = []
        self.swap_out: list[tuple[int, int]] = []
        self.swap_in: dict[RequestKey, list[tuple[int, int]]] = {}
        self.pad_chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Spend budget on ``chunk``."""
        self.budget -= chunk.end - chunk.start
        self.chunks.append(chunk)

    def withdraw(self, request: EngineRequest) -> list[tuple[int, int]]:
        """Take back the chunk and the copies of ``request``; returns the copies."""
        self.budget += sum(c.end - c.start for c in self.chunks if c.request is request)
        self.chunks = [chunk for chunk in self.chunks if chunk.request is not request]
        return self.copies.pop(request.key, [])

    def plan(self) -> Plan:
        """What it has come to."""
        if not (self.copies or self.preempted or self.swap_in or self.pad_chunks):
            return Plan(tuple(self.chunks))  # what nearly every iteration is
        return Plan(
            chunks=tuple(self.chunks),
            block_copies=tuple(pair for pairs in self.copies.values() for pair in pairs),
            preempted=tuple(self.preempted),
            swap_out=tuple(self.swap_out),
            swap_in=tuple(pair for pairs in self.swap_in.values() for pair in pairs),
            pad_chunks=tuple(self.pad_chunks),
        )


class Planner:
    """Makes plans; changes states and block tables of the requests as it goes."""

    def __init__(
        self,
        table: RequestTable,
        blocks: BlockManager,
        limits: IterationLimits,
        *,
        order: OrderKey,
        enable_prefix_cache: bool,
        swap: SwapSpace | None,
    ) -> None:
        self._table = table
        self._blocks = blocks
        self._limits = limits
        self._order = order
        self._enable_prefix_cache = enable_prefix_cache
        self._swap = swap
        self._running = table.in_state(EngineState.RUNNING)
        self._waiting = table.in_state(EngineState.WAITING)
        self._swapped = table.in_state(EngineState.SWAPPED)
        self._now_s = 0.0
        self._draft = Draft(0)

    def plan(self, now_s: float) -> Plan:
        """The batch of this iteration."""
        self._now_s = now_s
        self._draft = Draft(self._limits.max_num_batched_tokens)
        self._choose()
        if self._swap is not None:
            self._swap.settle()
        return self._draft.plan()

    @property
    def is_cut_short(self) -> bool:
        """Whether others might have been admitted, but for the budget or a preemption."""
        has_seats = len(self._running) < self._limits.max_num_seqs
        return bool(self._draft.preempted) or (has_seats and self._draft.budget <= 0)

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The iteration behind ``plan`` while nobody knows what tokens ``plan`` will give.

        Every request of ``plan`` that can go on does, with the token to come. Those that end after
        all are computed in vain. ``None`` where the tokens themselves matter, where somebody would
        have to be preempted or a block be copied, behind chunks that do not sample, and while
        others run that got no share of ``plan``.
        """
        due = [chunk for chunk in plan.chunks if chunk.is_due]
        if len(due) < len(self._running) or not all(chunk.is_sampling for chunk in due):
            return None
        going_on = [chunk for chunk in due if not chunk.is_last]
        if any(chunk.request.request.sampling.has_penalties for chunk in going_on):
            return None
        chunks = []
        for chunk in going_on:
            table = self._table_ahead(chunk.request, chunk.end)
            if table is None:
                return None
            chunks.append(Chunk(chunk.request, chunk.end, chunk.end + 1, True, table))
        return Plan(chunks=tuple(chunks)) if chunks else None

    def _table_ahead(self, request: EngineRequest, position: int) -> Sequence[int] | None:
        """The block table of ``request`` with room at ``position``, if it is cheap to have.

        A block that has been taken for it stays the request's, whether it is used or not.
        """
        blocks, index = self._blocks, position // self._blocks.block_size
        if index == len(blocks.block_table(request.key)):
            if blocks.num_free_blocks == 0:
                return None
            blocks.allocate(request.key, 1)
        return blocks.writable_table(request.key, index)

    def _choose(self) -> None:
        """Fill the draft."""
        self._continue()
        if self._waiting or self._swapped:
            self._admit([*self._swapped.values(), *self._waiting.values()])

    def _continue(self) -> None:
        """Schedule what runs: every decode first, then prefills with what budget is left."""
        prefills = []
        size, writable_table = self._blocks.block_size, self._blocks.writable_table
        for request in list(self._running.values()):
            if request.state is not EngineState.RUNNING:
                continue  # preempted meanwhile
            start, end = request.num_computed_tokens, len(request.token_ids)
            if end - start > 1:
                prefills.append(request)
                continue
            table = writable_table(request.key, start // size)
            if table is None:
                self._schedule(request)
            else:  # what nearly every decode is; at large batches this loop is what planning costs
                self._draft.chunks.append(Chunk(request, start, end, True, table))
                self._draft.budget -= 1
        for request in sorted(prefills, key=self._rank):
            if request.state is EngineState.RUNNING:
                self._schedule(request)

    def _rank(self, request: EngineRequest) -> tuple[Any, int]:
        """A strict order: nobody is preempted for somebody of equal rank."""
        return self._order(request, self._now_s), request.arrival

    def _schedule(self, request: EngineRequest) -> None:
        """Give ``request`` what it needs of the remaining budget."""
        start, num_tokens = request.num_computed_tokens, len(request.token_ids)
        end = min(num_tokens, start + self._draft.budget)
        if end > start and self._make_room(request, start, end):
            table = self._blocks.block_table(request.key)
            self._draft.add(Chunk(request, start, end, end == num_tokens, table))

    def _admit(self, candidates: Sequence[EngineRequest]) -> None:
        """Let ``candidates`` run, in order, as far as budget, seats and blocks reach."""
        is_blocked = False
        # What was preempted a moment ago would only take back the blocks just freed.
        if self._draft.preempted or not self._has_room():
            return
        for request in sorted(candidates, key=self._rank):
            if self._draft.preempted or not self._has_room():
                return
            # Nobody overtakes a request for want of blocks, but those that brought their own; who
            # waits for a sibling will get blocks from that one.
            if self._blocks.owns(request.key):
                is_admitted = self._keep_blocks(request)
            elif is_blocked:
                continue
            elif awaits_sibling(request, self._running.values(), self._rank):
                self._on_deferred(request)
                continue
            else:
                is_admitted = self._take_blocks(request)
            is_blocked = is_blocked or not is_admitted
            if is_admitted:
                request.was_admitted = True
                self._on_admitted(request)

    def _on_admitted(self, request: EngineRequest) -> None:
        """One more runs."""
        self._schedule(request)

    def _on_deferred(self, request: EngineRequest) -> None:
        """One more waits for what a sibling computes; it will be a candidate again."""

    def _has_room(self) -> bool:
        return self._draft.budget > 0 and len(self._running) < self._limits.max_num_seqs

    def _take_blocks(self, request: EngineRequest) -> bool:
        """Let ``request`` run in blocks for all its tokens, if so many are free.

        What the prefix cache has is among them; what is in host memory is copied back.
        """
        blocks, size = self._blocks, self._blocks.block_size
        is_swapped = request.state is EngineState.SWAPPED
        keys: Sequence[bytes] = ()
        if self._enable_prefix_cache:
            # At least one token is computed, whose logits are needed.
            num_tokens = request.num_computed_tokens if is_swapped else request.num_tokens - 1
            keys = request.full_block_keys(num_tokens, size)
        num_hits, num_unowned = blocks.count_cached(keys)
        needed = blocks.blocks_for(request.num_tokens) - num_hits
        watermark = math.ceil(blocks.num_blocks * WATERMARK_FRACTION) if self._running else 0
        if blocks.num_free_blocks - num_unowned - needed < watermark:
            return False
        blocks.create(request.key)
        blocks.adopt(request.key, keys)
        blocks.allocate(request.key, needed)
        request.num_registered_blocks = num_hits
        if is_swapped:
            assert self._swap is not None
            host_blocks = self._swap.retire(request.key)[num_hits:]
            table = blocks.block_table(request.key)[num_hits:]
            self._draft.swap_in[request.key] = list(zip(host_blocks, table, strict=False))
            self._table.apply(request, EngineEvent.SWAP_IN)
            return True
        request.num_computed_tokens = num_hits * size
        if not request.was_admitted:
            request.num_cached_tokens = request.num_computed_tokens
        self._table.apply(request, EngineEvent.SCHEDULE)
        return True

    def _keep_blocks(self, request: EngineRequest) -> bool:
        """Let ``request`` run in the blocks that it has, unless it would be the first to lose them.

        It waits with them then: what they hold was paid for.
        """
        start, size = request.num_computed_tokens, self._blocks.block_size
        stop = self._blocks.blocks_for(min(request.num_tokens, start + self._draft.budget))
        missing = self._blocks.count_missing(request.key, start // size, stop)
        if missing > self._blocks.num_free_blocks and self._last_holder() is request:
            return False
        self._table.apply(request, EngineEvent.SCHEDULE)
        return True

    def _make_room(self, request: EngineRequest, start: int, end: int) -> bool:
        """Make the blocks of tokens ``[start, end)`` exist and writable.

        Preempts from the end of the order until they fit; ``False`` if that hit ``request``.
        """
        blocks, key = self._blocks, request.key
        first, stop = start // blocks.block_size, blocks.blocks_for(end)
        while blocks.count_missing(key, first, stop) > blocks.num_free_blocks:
            victim = self._last_holder()
            self._preempt(victim)
            if victim is request:
                return False
        size = len(blocks.block_table(key))
        blocks.allocate(key, max(0, stop - size))
        copies = [blocks.make_writable(key, index) for index in range(first, min(stop, size))]
        if made := [copy for copy in copies if copy is not None]:
            self._draft.copies[key] = made
        return True

    def _last_holder(self) -> EngineRequest:
        """The last in the order of those whose blocks can be taken away."""
        holders = (r for r in self._waiting.values() if self._blocks.owns(r.key))
        return max([*self._running.values(), *holders], key=self._rank)

    def _preempt(self, victim: EngineRequest) -> None:
        """Take all blocks of ``victim``; its KV is kept in host memory or computed again."""
        key, swap = victim.key, self._swap
        copies = self._draft.withdraw(victim)
        kind = PreemptionKind.RECOMPUTE
        if swap is not None:
            kind = swap.choose(victim.num_computed_tokens)
        if swap is not None and self._draft.swap_in.pop(key, None) is not None:
            kind = PreemptionKind.SWAP
            swap.keep(key)  # it was to come back in this plan: its KV has not left the host
            self._table.apply(victim, EngineEvent.SWAP_OUT)
        elif swap is not None and kind is PreemptionKind.SWAP:
            # The copies that were to be made are not: their sources still have the content.
            sources = {copy: source for source, copy in copies}
            host_blocks = swap.take(key, victim.num_computed_tokens)
            table = [sources.get(block, block) for block in self._blocks.block_table(key)]
            self._draft.swap_out += zip(table, host_blocks, strict=False)
            self._table.apply(victim, EngineEvent.SWAP_OUT)
        else:
            victim.rewind(0, self._blocks.block_size)
            self._table.apply(victim, EngineEvent.PREEMPT)
        self._blocks.free(key)
        victim.num_preemptions += 1
        self._draft.preempted.append((key, kind))
