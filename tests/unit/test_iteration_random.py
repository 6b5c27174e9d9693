"""Random traffic through the iteration scheduler, with the bytes of every block kept by hand.

What a block holds is modelled by chained hashes of the tokens before each slot: a chunk may only be
computed where the KV of all tokens before it is what those tokens make of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from shared.core.batch_plan import Chunk, IterationLimits, Plan
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import Batching, IterationScheduler
from shared.core.preemption import PreemptionCost, PreemptionKind, SwapSpace
from shared.core.request import Request, RequestKey, SamplingParams
from shared.errors import OutOfBlocks

BLOCK_SIZE = 4
NUM_BLOCKS = 16
MAX_MODEL_LEN = 40
LIMITS = IterationLimits(max_num_seqs=5, max_num_batched_tokens=9, max_model_len=MAX_MODEL_LEN)


def _kv(token_ids: Sequence[int]) -> list[int]:
    """What stands for the KV of each token: it depends on all tokens up to it."""
    hashes, last = [], 0
    for token in token_ids:
        last = hash((last, token))
        hashes.append(last)
    return hashes


def _next_token(seed: int, token_ids: Sequence[int]) -> int:
    """What is sampled."""
    return 100 + hash((seed, *token_ids)) % 5


@dataclass
class Memory:
    """Blocks of the device and of the host, by hand."""

    device: dict[int, list[int | None]] = field(default_factory=dict)
    host: dict[int, list[int | None]] = field(default_factory=dict)

    def copy(self, plan: Plan) -> None:
        for block, host_block in plan.swap_out:
            self.host[host_block] = list(self.device[block])
        for source, target in plan.block_copies:
            self.device[target] = list(self.device[source])
        for host_block, block in plan.swap_in:
            self.device[block] = list(self.host[host_block])

    def write(self, table: Sequence[int], start: int, values: Sequence[int]) -> None:
        for position, value in enumerate(values, start=start):
            block = self.device.setdefault(table[position // BLOCK_SIZE], [None] * BLOCK_SIZE)
            block[position % BLOCK_SIZE] = value

    def compute(self, chunk: Chunk) -> None:
        kv = _kv(chunk.request.token_ids)
        seen = [
            self.device[chunk.block_table[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            for position in range(chunk.start)
        ]
        assert seen == kv[: chunk.start], f"{chunk.key} would see KV that is not its own"
        self.write(chunk.block_table, chunk.start, kv[chunk.start : chunk.end])


class Traffic:
    """A scheduler, its memory, and everything that was asked of it."""

    def __init__(
        self, rng: random.Random, *, swap: SwapSpace | None, batching: Batching, prefix_cache: bool
    ) -> None:
        self.rng = rng
        self.scheduler = IterationScheduler(
            LIMITS,
            BlockManager(NUM_BLOCKS, BLOCK_SIZE),
            enable_prefix_cache=prefix_cache,
            batching=batching,
            swap=swap,
        )
        self.memory = Memory()
        self.requests: dict[RequestKey, Request] = {}
        self.outputs: dict[RequestKey, list[int]] = {}
        self.seeds: dict[RequestKey, list[int]] = {}
        """Of each token; other ones after a rollback, as speculation is taken back for others."""
        self.num_rollbacks = 0
        self.released: set[RequestKey] = set()
        self.decoding: set[RequestKey] = set()
        self.imported: set[RequestKey] = set()
        self.shared: set[RequestKey] = set()
        """Who began with KV although nothing was imported; without a cache, a sibling's."""
        self.num_swapped_out = 0
        self.num_pad_chunks = 0

    def _new(self) -> Request:
        """A request that may get siblings."""
        rng = self.rng
        first = rng.choice((10, 20))
        request = Request(
            request_id=str(len(self.requests)),
            attempt=0,
            prompt_token_ids=tuple(range(first, first + rng.randint(1, 24))),
            sampling=SamplingParams(max_tokens=rng.randint(1, 14), ignore_eos=True),
            priority=rng.randrange(2),
            group_id=str(len(self.requests)),
        )
        self.requests[request.key] = request
        return request

    def _forget(self, request: Request) -> None:
        del self.requests[request.key]

    def _any(self, *states: EngineState) -> RequestKey | None:
        keys = [key for key in self.requests if self.scheduler.state_of(key) in states]
        return self.rng.choice(keys) if keys else None

    def arrive(self) -> None:
        if self.scheduler.count(EngineState.WAITING) < 6:
            is_prefill_only = self.rng.random() < 0.2
            self.scheduler.add(self._new(), prefill_only=is_prefill_only)

    def import_(self) -> None:
        """Blocks that were reserved are filled by somebody else."""
        request = self._new()
        try:
            _, cached = self.scheduler.reserve(request.key, request.num_tokens, prefix_of=request)
        except OutOfBlocks:
            self._forget(request)
            return
        count = request.num_tokens - 1
        table = self.scheduler.reservations.table(request.key)
        if cached < count:
            kv = _kv(request.prompt_token_ids)[cached:count]
            self.memory.write(table, cached, kv)
        self.scheduler.start_reserved(request, num_computed_tokens=max(count, cached))
        self.imported.add(request.key)

    def sibling(self) -> None:
        """Some more choices of a call; those of a later attempt have output already."""
        known = self._any(EngineState.RUNNING, EngineState.HELD, EngineState.WAITING)
        if known is None or self.scheduler.count(EngineState.WAITING) > 6:
            return
        first = self.requests[known]
        emitted = (*first.output_token_ids, *self.outputs.get(known, ()))
        for _ in range(self.rng.randint(1, 3)):
            most = min(len(emitted), MAX_MODEL_LEN - 1 - len(first.prompt_token_ids))
            output = emitted[: self.rng.randint(0, most)] if self.rng.random() < 0.3 else ()
            request = replace(
                first,
                request_id=str(len(self.requests)),
                output_token_ids=output,
                sampling=replace(first.sampling, max_tokens=len(output) + self.rng.randint(1, 14)),
                priority=self.rng.randrange(2) if self.rng.random() < 0.2 else first.priority,
            )
            self.requests[request.key] = request
            self.scheduler.add(request, prefill_only=self.rng.random() < 0.2)

    def release(self) -> None:
        key = self._any(*(state for state in EngineState))
        if key is not None:
            assert self.scheduler.release(key)
            self.released.add(key)
            self.decoding.discard(key)

    def take_over(self) -> None:
        """What was held is wanted no more."""
        for key in list(self.requests):
            if self.scheduler.state_of(key) is EngineState.HELD:
                assert self.scheduler.release(key)
                self.released.add(key)

    def fail(self) -> None:
        key = self._any(EngineState.RUNNING, EngineState.WAITING, EngineState.SWAPPED)
        if key is not None:
            for block in self.scheduler.fail(key):
                self.memory.device[block] = [None] * BLOCK_SIZE
            self.released.add(key)
            self.decoding.discard(key)

    def rollback(self) -> None:
        key = self._any(EngineState.RUNNING, EngineState.WAITING, EngineState.SWAPPED)
        if key is not None and (tokens := self.outputs.get(key)):
            count = self.rng.randint(1, len(tokens))
            self.scheduler.rollback(key, count)
            del tokens[-count:], self.seeds[key][-count:]
            self.num_rollbacks += 1
            self.decoding.discard(key)

    def resize(self) -> None:
        """Give back some blocks, or get back those that are missing."""
        blocks = self.scheduler.blocks
        if self.rng.random() < 0.5:
            blocks.grow(NUM_BLOCKS - blocks.num_blocks)
            return
        count = self.rng.randint(1, 3)
        try:
            moves = self.scheduler.shrink(count)
        except OutOfBlocks:
            return
        for source, target in moves:
            self.memory.device[target] = list(self.memory.device.get(source, [None] * BLOCK_SIZE))
        for block in range(blocks.num_blocks, NUM_BLOCKS):
            self.memory.device.pop(block, None)

    def step(self) -> bool:
        """One iteration; ``False`` if there was nothing to do."""
        scheduler = self.scheduler
        plan = scheduler.plan()
        self.memory.copy(plan)
        self.num_swapped_out += len(plan.swap_out)
        self.num_pad_chunks += len(plan.pad_chunks)
        assert sum(chunk.end - chunk.start for chunk in plan.computed) <= 9
        assert len(plan.chunks) <= 5
        self._assert_no_decode_stalls(plan)
        for chunk in plan.chunks:
            self.memory.compute(chunk)
        for chunk in plan.pad_chunks:
            (scratch,) = set(chunk.block_table)
            assert all(scratch not in other.block_table for other in plan.chunks)
        seeds = {chunk.key: int(chunk.key.request_id) + self.num_rollbacks for chunk in plan.chunks}
        sampled = {
            chunk.key: (_next_token(seeds[chunk.key], chunk.request.token_ids),)
            for chunk in plan.chunks
            if chunk.is_sampling and self.rng.random() < 0.98
        }
        for item in scheduler.commit(plan, sampled):
            tokens = self.outputs.setdefault(item.request.key, [])
            assert item.offset == len(item.request.request.output_token_ids) + len(tokens)
            if item.request.num_cached_tokens > 0 and item.request.key not in self.imported:
                self.shared.add(item.request.key)
            tokens += item.token_ids
            self.seeds.setdefault(item.request.key, []).append(seeds[item.request.key])
        self.decoding = {
            chunk.key
            for chunk in plan.chunks
            if chunk.is_sampling and scheduler.state_of(chunk.key) is EngineState.RUNNING
        }
        scheduler.check_integrity()
        has_worked = bool(plan.computed or plan.preempted)
        num_waiting = scheduler.count(EngineState.WAITING) + scheduler.count(EngineState.SWAPPED)
        # Only blocks that somebody outside has to release may keep the waiting from running.
        assert has_worked or num_waiting == 0 or scheduler.count(EngineState.HELD) > 0
        return has_worked

    def _assert_no_decode_stalls(self, plan: Plan) -> None:
        """Whoever had a token in the last step has one in this, unless its blocks were taken."""
        computed = {chunk.key for chunk in plan.chunks if chunk.is_sampling}
        preempted = {key for key, _ in plan.preempted}
        assert self.is_static or self.decoding <= computed | preempted

    is_static = False

    def assert_all_served(self) -> None:
        for key, request in self.requests.items():
            tokens = [*request.prompt_token_ids, *request.output_token_ids]
            num_emitted = len(request.output_token_ids)
            goal = min(request.sampling.max_tokens - num_emitted, MAX_MODEL_LEN - len(tokens))
            for seed in self.seeds.get(key, ()):
                tokens.append(_next_token(seed, tokens))
            got = self.outputs.get(key, [])
            assert got == tokens[request.num_tokens :]
            is_held = self.scheduler.state_of(key) is EngineState.HELD
            assert len(got) == goal or key in self.released or is_held


COSTS = {
    "recompute": None,
    "swap": PreemptionCost(recompute_s=lambda tokens: 1.0, swap_s=lambda blocks: 0.0),
    "cheaper": PreemptionCost(
        recompute_s=lambda tokens: 0.1 + tokens**2 * 1e-2, swap_s=lambda blocks: blocks * 0.3
    ),
}


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("preemption", COSTS)
def test_random_traffic_sees_only_its_own_kv_and_leaks_nothing(
    preemption: str, batching: Batching, prefix_cache: bool
) -> None:
    rng = random.Random(f"{preemption} {batching} {prefix_cache}")
    cost = COSTS[preemption]
    swap = SwapSpace(12, BLOCK_SIZE, cost) if cost is not None else None
    traffic = Traffic(rng, swap=swap, batching=batching, prefix_cache=prefix_cache)
    traffic.is_static = batching == "static"
    rare = [traffic.release, traffic.fail, traffic.rollback, traffic.resize, traffic.take_over]
    for _ in range(1500):
        choice = rng.random()
        if choice < 0.25:
            traffic.arrive()
        elif choice < 0.33:
            traffic.import_()
        elif choice < 0.41:
            traffic.sibling()
        elif choice < 0.55:
            rng.choice(rare)()
        traffic.step()
    traffic.take_over()
    idle = 0
    while idle < 2:  # the first plan after the last end may still clear up
        idle = 0 if traffic.step() else idle + 1
        traffic.take_over()
    traffic.assert_all_served()
    assert len(traffic.shared) > 20
    scheduler = traffic.scheduler
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks
    if swap is not None:
        assert swap.num_free_blocks == swap.num_blocks
    for kind in PreemptionKind:
        is_expected = preemption == "cheaper" or (kind == preemption)
        assert not is_expected or scheduler.preemptions[kind] > 5
    assert (traffic.num_swapped_out > 0) == (preemption != "recompute")
    assert (traffic.num_pad_chunks > 100) == (batching == "static")
