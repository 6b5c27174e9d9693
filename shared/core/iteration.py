"""Iteration-level scheduling: the requests of one engine between their first and last token.

The engine and the simulator drive the same object: ``plan`` says what to compute, ``commit`` books
what came out. How a batch is chosen is in ``batch_plan``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from shared.core.batch_plan import (
    IterationLimits,
    OrderKey,
    Plan,
    Planner,
    first_come_first_served,
)
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineEvent, EngineRequest, EngineState, check_request
from shared.core.preemption import PreemptionKind, SwapSpace
from shared.core.prefix import block_keys, root_key
from shared.core.request import FinishReason, Request, RequestKey
from shared.core.request_table import RequestTable
from shared.core.reservations import Reservations
from shared.core.siblings import heirs, share_prompt
from shared.core.static_batch import StaticPlanner
from shared.errors import ContextLengthExceeded, InvalidRequest, LifecycleError, OutOfBlocks

Batching = Literal["continuous", "static"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)


class Committed(NamedTuple):
    """New output tokens of one request, from output position ``offset`` on."""

    request: EngineRequest
    offset: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class IterationScheduler:
    """Waiting and running requests of one engine, and the blocks they own.

    ``plan`` and ``commit`` alternate; everything else is called between a ``commit`` and the next
    ``plan``, except ``fail`` and ``release``, which are allowed at any time. With ``swap`` a
    preempted request may keep its KV in host memory; without, it is always computed again.

    Requests of one group with one prompt compute it once (``siblings``).

    ``plan_ahead`` lets a device compute while the host books: it is called between a ``plan`` and
    its ``commit``, and what it gives takes the place of the next ``plan``. From ``launched`` until
    it is committed too it is in flight: requests may come, go and be rolled back, but the blocks
    of those that end stay theirs, for they are still written to.
    """

    def __init__(
        self,
        limits: IterationLimits,
        blocks: BlockManager,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        fingerprint: str = "",
        enable_prefix_cache: bool = True,
        order: OrderKey = first_come_first_served,
        batching: Batching = "continuous",
        swap: SwapSpace | None = None,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.preemptions = dict.fromkeys(PreemptionKind, 0)
        self._eos_token_ids = eos_token_ids
        self._fingerprint = fingerprint
        self._enable_prefix_cache = enable_prefix_cache
        self._arrivals = 0
        self._has_changed = False  # what admission depends on, since the last plan
        self._in_flight: frozenset[EngineRequest] = frozenset()
        self._swap = swap
        self.reservations = Reservations(blocks)
        self._table = RequestTable()
        self._waiting = self._table.in_state(EngineState.WAITING)
        make_planner = StaticPlanner if batching == "static" else Planner
        self._planner = make_planner(
            self._table,
            blocks,
            limits,
            order=order,
            enable_prefix_cache=enable_prefix_cache,
            swap=swap,
        )

    # -- what there is

    def state_of(self, key: RequestKey) -> EngineState | None:
        """The state of an attempt, ``None`` if it is not known (any more)."""
        request = self._table.by_key.get(key)
        if request is not None:
            return request.state
        return EngineState.RESERVED if key in self.reservations else None

    def get(self, key: RequestKey) -> EngineRequest | None:
        """The started attempt ``key``, to be read only."""
        return self._table.by_key.get(key)

    def count(self, state: EngineState) -> int:
        """How many attempts are in ``state``, which must be a live one."""
        if state is EngineState.RESERVED:
            return len(self.reservations)
        return len(self._table.in_state(state))

    @property
    def num_preemptions(self) -> int:
        """How often blocks were taken away, of either kind; ``preemptions`` has each."""
        return sum(self.preemptions.values())

    def num_cached_tokens(self, request: Request) -> int:
        """Leading tokens whose KV this engine's prefix cache holds now (never all of them)."""
        return self.blocks.count_cached(self._cacheable(request))[0] * self.blocks.block_size

    # -- coming and going

    def add(
        self, request: Request, *, prefill_only: bool = False, is_exporting: bool = False
    ) -> None:
        """Queue an attempt; raises ``InvalidRequest``, or ``LifecycleError`` if it is known."""
        self._check_new(request.key)
        check_request(request, self.limits.max_model_len)
        self._start(request, prefill_only=prefill_only, is_exporting=is_exporting)

    def reserve(
        self, key: RequestKey, num_tokens: int, *, prefix_of: Request | None = None
    ) -> tuple[int, int]:
        """Allocate blocks for ``num_tokens`` tokens and one block more.

        With ``prefix_of`` its locally cached prefix is taken into the table first. Returns the
        number of blocks and of tokens cached; raises ``OutOfBlocks``.
        """
        self._check_new(key)
        if not 1 <= num_tokens <= self.limits.max_model_len:
            raise ContextLengthExceeded(
                f"{num_tokens} tokens, this engine takes {self.limits.max_model_len}", field=None
            )
        most = self.blocks.blocks_for(self.limits.max_model_len)
        count = min(self.blocks.blocks_for(num_tokens) + 1, most)
        cached = self._cacheable(prefix_of)[:count] if prefix_of is not None else ()
        num_cached_blocks = self.reservations.make(key, count, cached)
        return count, num_cached_blocks * self.blocks.block_size

    def start_reserved(
        self,
        request: Request,
        *,
        num_computed_tokens: int,
        prefill_only: bool = False,
        is_exporting: bool = False,
    ) -> None:
        """Queue a reserved attempt whose first ``num_computed_tokens`` tokens have their KV."""
        held_tokens = len(self.reservations.table(request.key)) * self.blocks.block_size
        check_request(request, self.limits.max_model_len)
        if not 0 <= num_computed_tokens < min(request.num_tokens, held_tokens + 1):
            raise InvalidRequest(
                f"{num_computed_tokens} computed tokens of {request.num_tokens}, "
                f"{held_tokens} reserved",
                field=None,
            )
        state = self.reservations.start(request.key)
        started = self._start(
            request, prefill_only=prefill_only, is_exporting=is_exporting, state=state
        )
        started.was_admitted = True
        started.num_computed_tokens = started.num_cached_tokens = num_computed_tokens
        self._register(started)

    def release(self, key: RequestKey) -> bool:
        """Forget an attempt in whatever state and free its blocks; ``False`` if unknown."""
        if self.reservations.release(key):
            self._has_changed = True
            return True
        return self._end(key, EngineEvent.RELEASE) is not None

    def fail(self, key: RequestKey) -> list[int]:
        """End an attempt whose computation went wrong; the block ids whose content to distrust.

        They are free at once: what is in flight writes to them before the caller does.
        """
        return self._end(key, EngineEvent.FAIL, discard=True) or []

    def discard(self, request: EngineRequest) -> list[int]:
        """``fail`` for one that ended while in flight, where it turned out to have gone wrong."""
        owns = self.blocks.owns(request)
        return self.blocks.free(request, discard=True) if owns else []

    def rollback(self, key: RequestKey, num_tokens: int) -> None:
        """Take back the last ``num_tokens`` output tokens and their KV (speculation).

        The new last token's KV is computed again, as its logits are needed. Raises
        ``LifecycleError`` unless ``key`` runs, waits or is swapped out and has generated that many.
        """
        request = self._table.by_key.get(key)
        if request is None or request.state is EngineState.HELD:
            raise LifecycleError(
                f"{key} is {self.state_of(key) or 'unknown'}: nothing to take back"
            )
        generated = request.num_tokens - request.request.num_tokens
        if not 0 <= num_tokens <= generated:
            raise LifecycleError(f"{num_tokens} tokens to take back, {generated} generated")
        if num_tokens == 0:
            return
        del request.token_ids[request.num_tokens - num_tokens :]
        del request.block_keys[request.num_tokens // self.blocks.block_size :]
        request.rewind(request.num_tokens - 1, self.blocks.block_size)
        if self.blocks.owns(key):
            if request not in self._in_flight:  # else those behind are still written to
                self.blocks.truncate(key, self.blocks.blocks_for(request.num_tokens))
        elif self._swap is not None and self._swap.owns(key):
            self._swap.truncate(key, request.num_computed_tokens)

    def shrink(self, num_blocks: int) -> list[tuple[int, int]]:
        """Give up the highest block ids; the (source, target) copies that have to be made first.

        Raises ``OutOfBlocks`` unless as many are free and what stays holds the longest request.
        """
        most = self.blocks.num_blocks - self.blocks.blocks_for(self.limits.max_model_len)
        if num_blocks > most:
            raise OutOfBlocks(num_blocks, min(most, self.blocks.num_free_blocks))
        return self.blocks.shrink(num_blocks)

    def grow(self, num_blocks: int) -> None:
        """Add free blocks behind the highest id."""
        self.blocks.grow(num_blocks)
        self._has_changed = True

    # -- iterations

    def plan(self, now_s: float = 0.0) -> Plan:
        """Choose the next batch; with continuous batching every decode first, then prefills."""
        plan = self._planner.plan(now_s)
        self._has_changed = self._planner.is_cut_short
        for _, kind in plan.preempted:
            self.preemptions[kind] += 1
        return plan

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """``Planner.plan_ahead``, unless somebody who waits might be admitted or gets blocks."""
        self._in_flight = frozenset()
        waiting = self._waiting.values()
        if self._has_changed and (waiting or self.count(EngineState.SWAPPED)):
            return None
        # The first token behind a prompt may go into a block that heirs get, and it may be one
        # whose KV is not finite.
        if waiting and any(
            chunk.completes_prompt and heirs(chunk.request, waiting, self.blocks)
            for chunk in plan.chunks
        ):
            return None
        return self._planner.plan_ahead(plan)

    def launched(self, plan: Plan) -> None:
        """``plan``, made by ``plan_ahead``, is being computed."""
        self._in_flight = frozenset(chunk.request for chunk in plan.chunks)

    def commit(self, plan: Plan, sampled: Mapping[RequestKey, Sequence[int]]) -> list[Committed]:
        """Book a computed plan and the tokens sampled, 0..k a request.

        Tokens behind one that ends the request are dropped. Requests that ended, were rolled back
        or got several tokens since the plan are passed over (``Chunk.is_due``). Finished ones free
        their blocks here, unless they are in flight once more.
        """
        size, waiting = self.blocks.block_size, self._waiting
        committed = []
        for chunk in plan.chunks:
            request, start, end, is_sampling, _ = chunk
            if not chunk.is_due:
                if request not in self._in_flight and self.blocks.owns(request):
                    self.blocks.free(request)
                continue
            if request.is_exporting:
                request.num_exported_blocks = chunk.export_range(size)[1]
            request.num_computed_tokens = end
            if end // size > request.num_registered_blocks and self._enable_prefix_cache:
                self._register(request)
            if start < request.num_prompt_tokens <= end:
                self._has_changed |= share_prompt(request, waiting.values(), self.blocks)
            if not is_sampling:
                continue
            request.is_exporting = False
            if tokens := sampled.get(request.key):
                committed.append(self._append(request, tokens))
            else:
                # Without a new token the last one's logits are needed once more.
                request.rewind(request.num_tokens - 1, size)
        return committed

    def _append(self, request: EngineRequest, tokens: Sequence[int]) -> Committed:
        offset = request.num_output_tokens
        count, finish_reason = request.append(tokens)
        if finish_reason is not None:
            self._end(request.key, EngineEvent.FINISH)
        elif request.prefill_only:
            self._table.apply(request, EngineEvent.HOLD)
        taken = tuple(tokens if count == len(tokens) else tokens[:count])
        return Committed(request, offset, taken, finish_reason)

    def check_integrity(self) -> None:
        """Verify the bookkeeping of requests and blocks; raises ``AssertionError``."""
        self.blocks.check_integrity()
        self._table.check_integrity()
        if self._swap is not None:
            self._swap.check_integrity()
        for key, request in self._table.by_key.items():
            is_swapped = request.state is EngineState.SWAPPED
            assert not (is_swapped and self.blocks.owns(key)), f"{key} is swapped and owns blocks"
            assert is_swapped == (self._swap is not None and self._swap.owns(key)), (
                f"{key} is {request.state}; its host blocks say otherwise"
            )

    # -- helpers

    def _root(self, request: Request) -> bytes:
        return root_key(self._fingerprint, request.tenant)

    def _cacheable(self, request: Request) -> list[bytes]:
        """Keys of the blocks that could be taken from the cache: at least one token is computed."""
        if not self._enable_prefix_cache:
            return []
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        return block_keys(tokens[:-1], self.blocks.block_size, self._root(request))

    def _check_new(self, key: RequestKey) -> None:
        if (state := self.state_of(key)) is not None:
            raise LifecycleError(f"{key} is {state} already")

    def _start(
        self,
        request: Request,
        *,
        prefill_only: bool = False,
        is_exporting: bool = False,
        state: EngineState = EngineState.WAITING,
    ) -> EngineRequest:
        sampling = request.sampling
        end_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            end_token_ids |= self._eos_token_ids
        started = EngineRequest(
            request=request,
            arrival=self._arrivals,
            root=self._root(request),
            end_token_ids=end_token_ids,
            max_num_tokens=min(
                len(request.prompt_token_ids) + sampling.max_tokens, self.limits.max_model_len
            ),
            prefill_only=prefill_only,
            is_exporting=is_exporting,
            state=state,
        )
        self._arrivals += 1
        self._has_changed = True
        self._table.add(started)
        return started

    def _register(self, request: EngineRequest) -> None:
        """Put blocks that have become full into the prefix cache."""
        if not self._enable_prefix_cache:
            return
        keys = request.full_block_keys(request.num_computed_tokens, self.blocks.block_size)
        for index in range(request.num_registered_blocks, len(keys)):
            self.blocks.register(request.key, index, keys[index])
        request.num_registered_blocks = len(keys)

    def _end(
        self, key: RequestKey, event: EngineEvent, *, discard: bool = False
    ) -> list[int] | None:
        """Take a started attempt out; its discarded blocks, ``None`` if it is unknown."""
        request = self._table.by_key.get(key)
        if request is None:
            return None
        self._has_changed = True
        self._table.apply(request, event)
        if self._swap is not None and self._swap.owns(key):
            self._swap.free(key)
        if not self.blocks.owns(key):
            return []
        if request in self._in_flight and not discard:
            self.blocks.rename(key, request)  # until the iteration is committed
            return []
        return self.blocks.free(key, discard=discard)
