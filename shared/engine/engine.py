"""The engine: requests in, tokens out, one iteration at a time."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.core.batch_plan import IterationLimits, OrderKey, Plan, first_come_first_served
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import IterationScheduler
from shared.core.preemption import PreemptionCost, PreemptionKind, SwapSpace
from shared.core.request import Request, RequestKey
from shared.core.step_work import StepWork, work_of
from shared.engine.attention import AttentionBackend
from shared.engine.chain import ModelChain
from shared.engine.config import EngineConfig
from shared.engine.flight import Iteration
from shared.engine.outputs import EngineStats, KVSink, RequestOutput, Reservation, StepOutput
from shared.engine.runner import MaskSource, ModelRunner
from shared.engine.spec import ModelSpec
from shared.errors import EngineError, InvalidRequest
from shared.kvcache.host_pool import HostPool
from shared.kvcache.layout import KVLayout
from shared.kvcache.pool import KVPool


class Engine:
    """A model, its KV pool and the requests that run on it.

    Not thread-safe: every method is called in one thread, between two calls of ``step``
    (``EngineThread`` sees to that). Any role is served by the same object: a request may be
    prefilled and decoded here, only prefilled (``prefill_only``), or begun elsewhere and go on
    from imported KV (``reserve``, ``import_kv``, ``start_reserved``).

    With ``export`` the KV of a request's prefill goes to ``kv_sink`` in the engine's thread, right
    after each layer of each chunk: per layer each block exactly once, full ones as soon as they
    are full, with the last chunk the partial last one too; cached prefix blocks included. An error
    raised by the sink fails the request whose KV it was given. It may be changed between steps.

    Requests of one group with one prompt, the choices of a call with ``n > 1``, compute it once;
    each exports its KV for itself all the same (``shared/core/siblings``).

    With a ``host_pool`` a preempted request keeps its KV there if ``preemption_cost`` says that
    this is cheaper than computing it again; without a cost always, while there is room.

    When it ``is_pipelined`` (by default on a GPU), a decode is launched before the tokens of the
    iteration before it have come to the host: the device does not wait for the host's bookkeeping.
    A request that ends has then been computed once more in vain, and one that waits is admitted
    an iteration later than it could be. With a ``mask_source``, which restricts the tokens that
    requests may get and must know those before, it is not pipelined.
    """

    def __init__(
        self,
        chain: ModelChain,
        pool: KVPool,
        config: EngineConfig,
        *,
        kv_sink: KVSink | None = None,
        order: OrderKey = first_come_first_served,
        backend: AttentionBackend | None = None,
        host_pool: HostPool | None = None,
        preemption_cost: PreemptionCost | None = None,
        is_pipelined: bool | None = None,
        mask_source: MaskSource | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec: ModelSpec = chain.spec
        self.layout: KVLayout = pool.layout
        self._block_bytes = pool.layout.block_bytes_all_layers
        self.pool = pool
        self._host_pool = host_pool
        self.device = chain.device
        self.group = chain.group
        self.max_model_len = min(
            config.max_model_len or self.spec.max_model_len,
            self.spec.max_model_len,
            pool.num_blocks * pool.layout.block_size,
        )
        self.kv_sink = kv_sink
        self._expert_load = chain.expert_load
        self._now_s = now_s
        self._swap = None
        if host_pool is not None:
            self._swap = SwapSpace(host_pool.num_blocks, pool.layout.block_size, preemption_cost)
        self._scheduler = IterationScheduler(
            IterationLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=self.max_model_len,
            ),
            BlockManager(pool.num_blocks, pool.layout.block_size),
            eos_token_ids=self.spec.eos_token_ids,
            fingerprint=self.spec.fingerprint,
            enable_prefix_cache=config.enable_prefix_cache,
            order=order,
            batching=config.batching,
            swap=self._swap,
        )
        self._runner = ModelRunner(
            chain, pool, backend or chain.attention(pool), mask_source=mask_source
        )
        if is_pipelined is None:
            is_pipelined = pool.device.type != "cpu"
        self._is_pipelined = is_pipelined and mask_source is None
        self._ahead: Iteration | None = None
        self._finished_s = 0.0
        self._step = 0
        self._total_prefill_tokens = 0
        self._total_decode_tokens = 0
        self._total_cached_tokens = 0
        self._total_failed = 0
        self._total_swapped_out_blocks = 0
        self._total_swapped_in_blocks = 0
        self._total_prefill_pad_tokens = 0
        self._total_decode_pad_tokens = 0

    # -- requests that begin here

    def add(self, request: Request, *, prefill_only: bool = False, export: bool = False) -> None:
        """Queue an attempt; it goes on at output position ``len(request.output_token_ids)``.

        With ``prefill_only`` it emits one token and is then held with its blocks until
        ``release`` (if that token ends it, it is finished as usual). Raises ``InvalidRequest`` for
        what this model cannot take, ``LifecycleError`` if the attempt is known already.
        """
        self._check(request, export)
        self._scheduler.add(request, prefill_only=prefill_only, is_exporting=export)

    def num_cached_tokens(self, request: Request) -> int:
        """Tokens at the front of ``request`` whose KV is in this engine's prefix cache now."""
        return self._scheduler.num_cached_tokens(request)

    # -- requests that come from elsewhere

    def reserve(
        self, key: RequestKey, num_tokens: int, *, prefix_of: Request | None = None
    ) -> Reservation:
        """Set aside blocks for ``num_tokens`` tokens and one block more, to be filled by imports.

        With ``prefix_of`` the locally cached prefix of that request is used for the first blocks.
        Raises ``OutOfBlocks``, ``ContextLengthExceeded``, or ``LifecycleError`` if ``key`` is known
        already.
        """
        num_blocks, num_cached = self._scheduler.reserve(key, num_tokens, prefix_of=prefix_of)
        return Reservation(key=key, num_blocks=num_blocks, num_cached_tokens=num_cached)

    def import_kv(
        self,
        key: RequestKey,
        layer: int,
        block_lo: int,
        block_hi: int,
        head_lo: int,
        head_hi: int,
        data: bytes | memoryview | NDArray[np.uint8],
    ) -> None:
        """Write KV bytes into blocks ``[block_lo, block_hi)`` of a reservation.

        Indices count in the reservation's own block table; ``data`` has the layout of
        ``KVLayout`` and is not kept. Raises ``LifecycleError`` unless ``key`` is reserved,
        ``ValueError`` for a range or size that does not fit.
        """
        blocks = self._scheduler.reservations.importable(key, block_lo, block_hi)
        self.pool.import_blocks(layer, blocks, head_lo, head_hi, data)

    def import_kv_layers(
        self,
        key: RequestKey,
        first_layer: int,
        block_lo: int,
        block_hi: int,
        head_lo: int,
        head_hi: int,
        data: memoryview,
    ) -> None:
        """``import_kv`` for one or more consecutive layers from ``first_layer`` on.

        ``data`` has the layers' bytes one after the other; its size says how many they are.
        Raises as ``import_kv``; layers before the one at fault are written then.
        """
        num_heads_and_blocks = (head_hi - head_lo) * (block_hi - block_lo)
        layer, start = first_layer, 0
        while start < data.nbytes:
            if layer >= self.layout.num_layers:
                raise ValueError(f"{data.nbytes} bytes are more than all layers from {first_layer}")
            end = start + num_heads_and_blocks * self.layout.head_bytes(layer)
            self.import_kv(key, layer, block_lo, block_hi, head_lo, head_hi, data[start:end])
            layer, start = layer + 1, end

    def start_reserved(
        self,
        request: Request,
        *,
        num_computed_tokens: int,
        prefill_only: bool = False,
        export: bool = False,
    ) -> None:
        """Let a reserved request run; its first ``num_computed_tokens`` tokens have their KV.

        At most ``request.num_tokens - 1``: then the next step decodes, which is how a decode
        takes over after a prefill that has sampled the last of ``request.output_token_ids``.
        With fewer the rest is prefilled here first. Raises as ``add``, and ``LifecycleError``
        unless the attempt is reserved; the reservation then stays as it was.
        """
        self._check(request, export)
        self._scheduler.start_reserved(
            request,
            num_computed_tokens=num_computed_tokens,
            prefill_only=prefill_only,
            is_exporting=export,
        )

    def export_kv(
        self,
        key: RequestKey,
        layer: int,
        block_lo: int,
        block_hi: int,
        head_lo: int = 0,
        head_hi: int | None = None,
    ) -> NDArray[np.uint8]:
        """A fresh copy of KV bytes of an attempt that has blocks (held, running, …).

        Raises ``LifecycleError`` if it has none, ``ValueError`` for a bad range.
        """
        table = self._scheduler.blocks.block_table(key)
        if not 0 <= block_lo <= block_hi <= len(table):
            raise ValueError(f"blocks [{block_lo}, {block_hi}) of {len(table)}")
        return self.pool.export_blocks(layer, table[block_lo:block_hi], head_lo, head_hi)

    # -- ends

    def release(self, key: RequestKey) -> bool:
        """Forget an attempt, whatever its state, and free its blocks; ``False`` if unknown.

        It produces no output after this returns.
        """
        return self._scheduler.release(key)

    def abort(self, key: RequestKey) -> bool:
        """``release`` by the name it has while a request runs."""
        return self.release(key)

    def rollback(self, key: RequestKey, num_tokens: int) -> None:
        """Take back the last ``num_tokens`` tokens generated here; generation goes on before them.

        What was emitted stays emitted: meant for tokens the caller has not passed on.
        """
        self._scheduler.rollback(key, num_tokens)

    # -- iterations

    def step(self) -> StepOutput | None:
        """Run one iteration; ``None`` if nothing can run until a request comes or goes.

        A request whose computation fails ends with an ``error`` while the others go on. Raises
        ``EngineError`` if the device itself has failed; the engine is unusable then.
        """
        current = self._ahead or self._start()
        if current is None:
            return None
        self._ahead = self._start_behind(current) if self._is_pipelined else None
        return self._finish(current)

    def _start(self) -> Iteration | None:
        started_s = time.perf_counter()
        plan = self._next_plan()
        if plan is None:
            return None
        work = work_of(plan.computed)
        return Iteration(plan, work, self._runner.launch(plan.computed, self.kv_sink), started_s)

    def _start_behind(self, current: Iteration) -> Iteration | None:
        """The iteration after ``current``, if it can do without knowing what comes of that."""
        started_s = time.perf_counter()
        plan = self._scheduler.plan_ahead(current.plan)
        if plan is None:
            return None
        flight = self._runner.launch_behind(current.flight, plan.chunks)
        if flight is None:
            return None
        self._scheduler.launched(plan)
        return Iteration(plan, work_of(plan.chunks), flight, started_s)

    def _finish(self, iteration: Iteration) -> StepOutput:
        """Book what came out."""
        plan, work = iteration.plan, iteration.work
        self._step += 1
        token_ids_by_key, logprobs_by_key, errors = iteration.flight.land()
        outputs = []
        for chunk in plan.computed if errors else ():
            if chunk.key in errors and chunk.is_due:
                outputs.append(self._fail(chunk.key, errors[chunk.key]))
            elif chunk.key in errors:  # nobody is to be told, but the blocks go to others
                self.pool.zero_blocks(self._scheduler.discard(chunk.request))
        self._count(plan, work, errors)
        committed = self._scheduler.commit(plan, token_ids_by_key)
        for request, offset, token_ids, finish_reason in committed:
            key = request.key
            logprobs = logprobs_by_key[key][: len(token_ids)] if key in logprobs_by_key else ()
            num_cached = request.num_cached_tokens
            outputs.append(
                RequestOutput(key, offset, token_ids, logprobs, finish_reason, None, num_cached)
            )
            if offset == len(request.request.output_token_ids):
                self._total_cached_tokens += num_cached
        # What was launched early began when the iteration before it was done.
        started_s = max(iteration.started_s, self._finished_s)
        self._finished_s = time.perf_counter()
        return StepOutput(
            step=self._step,
            outputs=tuple(outputs),
            stats=self.stats(work.num_batched_tokens, self._finished_s - started_s, work),
        )

    def stats(
        self, num_batched_tokens: int = 0, step_s: float = 0.0, work: StepWork | None = None
    ) -> EngineStats:
        """The state now, with the numbers of a step if it is for one."""
        scheduler, block_bytes = self._scheduler, self._block_bytes
        return EngineStats(
            num_running=scheduler.count(EngineState.RUNNING),
            num_waiting=scheduler.count(EngineState.WAITING),
            num_held=scheduler.count(EngineState.HELD),
            num_reserved=scheduler.count(EngineState.RESERVED),
            num_swapped=scheduler.count(EngineState.SWAPPED),
            num_blocks=self.num_blocks,
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_cached_blocks=scheduler.blocks.num_cached_blocks,
            num_batched_tokens=num_batched_tokens,
            step_s=step_s,
            total_prefill_tokens=self._total_prefill_tokens,
            total_decode_tokens=self._total_decode_tokens,
            total_cached_tokens=self._total_cached_tokens,
            total_preemptions=scheduler.num_preemptions,
            total_failed=self._total_failed,
            total_swap_preemptions=scheduler.preemptions[PreemptionKind.SWAP],
            total_swapped_out_bytes=self._total_swapped_out_blocks * block_bytes,
            total_swapped_in_bytes=self._total_swapped_in_blocks * block_bytes,
            total_prefill_pad_tokens=self._total_prefill_pad_tokens,
            total_decode_pad_tokens=self._total_decode_pad_tokens,
            work=work or StepWork(),
        )

    def expert_load(self) -> dict[int, tuple[int, ...]]:
        """Tokens given to each expert since the start, by layer; empty for a dense model.

        Only asking waits for the device. A token that is computed again counts again.
        """
        return self._expert_load.tokens_per_expert()

    def state_of(self, key: RequestKey) -> EngineState | None:
        """The state of an attempt, ``None`` if it is not known (any more)."""
        return self._scheduler.state_of(key)

    def check_integrity(self) -> None:
        """Verify the bookkeeping of requests and blocks; raises ``AssertionError``."""
        self._scheduler.check_integrity()
        assert self._scheduler.blocks.num_blocks == self.pool.num_blocks, "ids without blocks"

    # -- memory

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool now."""
        return self.pool.num_blocks

    def give_back_blocks(self, num_blocks: int) -> None:
        """Return the memory of ``num_blocks`` blocks; what is in them moves to others.

        Raises ``OutOfBlocks`` and changes nothing unless as many are free and what stays holds a
        request of ``max_model_len`` tokens.
        """
        self.pool.copy_blocks(self._scheduler.shrink(num_blocks))
        self.pool.give_back(num_blocks)

    def grow_blocks(self, num_blocks: int) -> None:
        """Add blocks out of the pool's reserve; raises ``OutOfMemory`` and changes nothing."""
        self.pool.grow(num_blocks)
        self._scheduler.grow(num_blocks)

    def set_prefill_cost(self, prefill_s: Callable[[int], float]) -> None:
        """From now on swap only where that is predicted to be faster than computing again.

        ``prefill_s(num_tokens)`` is a pure function; how fast blocks are copied was measured.
        """
        if self._host_pool is not None and self._swap is not None:
            block_swap_s = self._host_pool.block_swap_s
            self._swap.cost = PreemptionCost(
                recompute_s=prefill_s, swap_s=lambda num_blocks: num_blocks * block_swap_s
            )

    def _next_plan(self) -> Plan | None:
        while True:
            plan = self._scheduler.plan(self._now_s())
            if plan.swap_out or plan.block_copies or plan.swap_in:
                self._copy_blocks(plan)
            if plan.chunks or plan.pad_chunks:
                return plan
            # All it did was to take blocks away, which may let others run. This ends: nobody
            # without blocks can lose them.
            if not plan.preempted:
                return None

    def _copy_blocks(self, plan: Plan) -> None:
        if self._host_pool is not None:
            self._host_pool.copy_out(plan.swap_out)
        self.pool.copy_blocks(plan.block_copies)
        if self._host_pool is not None:
            self._host_pool.copy_in(plan.swap_in)
        self._total_swapped_out_blocks += len(plan.swap_out)
        self._total_swapped_in_blocks += len(plan.swap_in)

    def _fail(self, key: RequestKey, error: str) -> RequestOutput:
        request = self._scheduler.get(key)
        offset = request.num_output_tokens if request is not None else 0
        # What a failed request computed must never reach another through a recycled block: a NaN
        # survives every mask.
        self.pool.zero_blocks(self._scheduler.fail(key))
        self._total_failed += 1
        return RequestOutput(key=key, offset=offset, token_ids=(), error=error)

    def _count(self, plan: Plan, work: StepWork, errors: dict[RequestKey, str]) -> None:
        if errors or plan.pad_chunks or self._is_pipelined:  # not all of it was of use
            work = work_of(chunk for chunk in plan.chunks if chunk.is_due)
        self._total_decode_tokens += work.num_decode
        self._total_prefill_tokens += work.num_prefill_tokens
        for chunk in plan.pad_chunks:
            if chunk.start > 0:
                self._total_decode_pad_tokens += 1
            else:
                self._total_prefill_pad_tokens += chunk.end

    def _check(self, request: Request, export: bool) -> None:
        if export and self.kv_sink is None:
            raise EngineError("export without a KV sink")
        tokens = (*request.prompt_token_ids, *request.output_token_ids)
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.spec.vocab_size:
            raise InvalidRequest(
                f"token ids must be in [0, {self.spec.vocab_size})", field="prompt"
            )
