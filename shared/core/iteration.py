"""Iteration-level scheduling: the requests of one engine between their first and last token.

The engine and the simulator drive the same object: ``plan`` says what to compute, ``commit`` books
what came out. How a batch is chosen is in ``batch_plan``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.core.batch_plan import (
    IterationLimits,
    OrderKey,
    Plan,
    Planner,
    first_come_first_served,
)
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineEvent, EngineRequest, EngineState, check_request
from shared.core.prefix import block_keys, root_key
from shared.core.request import FinishReason, Request, RequestKey
from shared.core.reservations import Reservations
from shared.errors import ContextLengthExceeded, InvalidRequest, LifecycleError


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """New output tokens of one request, from output position ``offset`` on."""

    request: EngineRequest
    offset: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class IterationScheduler:
    """Waiting and running requests of one engine, and the blocks they own.

    ``plan`` and ``commit`` alternate; everything else is called between a ``commit`` and the next
    ``plan``, except ``fail`` and ``release``, which are allowed at any time.
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
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.order = order
        self.num_preemptions = 0
        self._eos_token_ids = eos_token_ids
        self._fingerprint = fingerprint
        self._enable_prefix_cache = enable_prefix_cache
        self._arrivals = 0
        self.reservations = Reservations(blocks)
        self._requests: dict[RequestKey, EngineRequest] = {}

    # -- what there is

    def state_of(self, key: RequestKey) -> EngineState | None:
        """The state of an attempt, ``None`` if it is not known (any more)."""
        request = self._requests.get(key)
        if request is not None:
            return request.state
        return EngineState.RESERVED if key in self.reservations else None

    def get(self, key: RequestKey) -> EngineRequest | None:
        """The started attempt ``key``, to be read only."""
        return self._requests.get(key)

    def count(self, state: EngineState) -> int:
        """How many attempts are in ``state``."""
        if state is EngineState.RESERVED:
            return len(self.reservations)
        return sum(request.state is state for request in self._requests.values())

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

    def fork(self, key: RequestKey, request: Request) -> None:
        """Queue ``request`` with the KV of the tokens it shares with ``key``, copied on write."""
        self._check_new(request.key)
        check_request(request, self.limits.max_model_len)
        parent = self._requests.get(key)
        if parent is None or not self.blocks.owns(key):
            raise LifecycleError(f"{key} has no blocks to share")
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        limit = min(parent.num_computed_tokens, len(tokens) - 1)
        common = 0
        while common < limit and tokens[common] == parent.token_ids[common]:
            common += 1
        self.blocks.fork(key, request.key, self.blocks.blocks_for(common))
        child = self._start(request)
        child.was_admitted = True
        child.num_computed_tokens = child.num_cached_tokens = common
        child.num_registered_blocks = common // self.blocks.block_size

    def release(self, key: RequestKey) -> bool:
        """Forget an attempt in whatever state and free its blocks; ``False`` if unknown."""
        return self.reservations.release(key) or self._end(key, EngineEvent.RELEASE) is not None

    def fail(self, key: RequestKey) -> list[int]:
        """End an attempt whose computation went wrong; the block ids whose content to distrust."""
        return self._end(key, EngineEvent.FAIL, discard=True) or []

    def rollback(self, key: RequestKey, num_tokens: int) -> None:
        """Take back the last ``num_tokens`` output tokens and their KV (speculation).

        The new last token's KV is computed again, as its logits are needed. Raises
        ``LifecycleError`` unless ``key`` waits or runs and has generated that many.
        """
        request = self._requests.get(key)
        if request is None or request.state not in (EngineState.WAITING, EngineState.RUNNING):
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
            self.blocks.truncate(key, self.blocks.blocks_for(request.num_tokens))

    # -- iterations

    def plan(self, now_s: float = 0.0) -> Plan:
        """Choose the next batch: every decode first, then prefill with what budget is left."""
        planner = Planner(
            self._requests.values(),
            self.blocks,
            self.limits,
            order=lambda request: self.order(request, now_s),
            enable_prefix_cache=self._enable_prefix_cache,
        )
        plan = planner.plan()
        self.num_preemptions += len(plan.preempted)
        return plan

    def commit(self, plan: Plan, sampled: Mapping[RequestKey, Sequence[int]]) -> list[Committed]:
        """Book a computed plan and the tokens sampled, 0..k a request.

        Tokens behind one that ends the request are dropped. Requests that failed or were released
        since the plan are passed over. Finished ones free their blocks here.
        """
        size = self.blocks.block_size
        committed = []
        for chunk in plan.chunks:
            request = chunk.request
            if self._requests.get(request.key) is not request:
                continue
            request.num_exported_blocks = max(
                request.num_exported_blocks, chunk.export_range(size)[1]
            )
            request.num_computed_tokens = chunk.end
            self._register(request)
            if not chunk.is_sampling:
                continue
            request.is_exporting = False
            tokens = sampled.get(request.key, ())
            if tokens:
                committed.append(self._append(request, tokens))
            # Without a new token the last one's logits are needed once more.
            request.rewind(request.num_tokens - 1, size)
        return committed

    def _append(self, request: EngineRequest, tokens: Sequence[int]) -> Committed:
        offset = request.num_output_tokens
        count, finish_reason = request.append(
            tokens,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self.limits.max_model_len,
        )
        if finish_reason is not None:
            self._end(request.key, EngineEvent.FINISH)
        elif request.prefill_only:
            request.apply(EngineEvent.HOLD)
        return Committed(
            request=request,
            offset=offset,
            token_ids=tuple(tokens[:count]),
            finish_reason=finish_reason,
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
        started = EngineRequest(
            request=request,
            arrival=self._arrivals,
            root=self._root(request),
            prefill_only=prefill_only,
            is_exporting=is_exporting,
            state=state,
        )
        self._arrivals += 1
        self._requests[request.key] = started
        return started

    def _register(self, request: EngineRequest) -> None:
        """Put blocks that have become full into the prefix cache."""
        num_full = request.num_computed_tokens // self.blocks.block_size
        if not self._enable_prefix_cache or num_full == request.num_registered_blocks:
            return
        keys = request.full_block_keys(request.num_computed_tokens, self.blocks.block_size)
        for index in range(request.num_registered_blocks, len(keys)):
            self.blocks.register(request.key, index, keys[index])
        request.num_registered_blocks = len(keys)

    def _end(
        self, key: RequestKey, event: EngineEvent, *, discard: bool = False
    ) -> list[int] | None:
        """Take a started attempt out; its discarded blocks, ``None`` if it is unknown."""
        request = self._requests.get(key)
        if request is None:
            return None
        request.apply(event)
        del self._requests[key]
        return self.blocks.free(key, discard=discard) if self.blocks.owns(key) else []
