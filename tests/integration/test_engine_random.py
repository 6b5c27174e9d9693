"""Random traffic on a real engine in too small a pool: everybody gets the reference's tokens.

Requests arrive, are preempted (their KV computed again or swapped), cancelled and rolled back, some
with siblings, in both batching modes, and the pool shrinks and grows under them.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared.core.engine_request import EngineState
from shared.core.preemption import PreemptionCost
from shared.core.request import Request, RequestKey
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.errors import OutOfBlocks, OutOfMemory
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt
from tests.models import FAMILIES, write_model

NUM_BLOCKS = 14
MAX_TOKENS = 14
NUM_PROMPTS = 8
SWAP_BYTES = 10 * 3 * 2 * 2 * 8 * 12 * 4  # ten blocks: layers, K and V, heads, tokens, width, bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


class Expected:
    """What the reference generates after each of a few prompts; sampled ones by an engine alone."""

    def __init__(self, path: Path) -> None:
        rng = random.Random(5)
        self.prompts = [random_prompt(rng.randint(3, 40), seed=i) for i in range(NUM_PROMPTS)]
        # Some begin alike, as chats do.
        self.prompts[1] = self.prompts[0][:16] + self.prompts[1]
        self._reference = Reference(path)
        self.greedy = [self._reference.greedy(prompt, MAX_TOKENS) for prompt in self.prompts]

    def assert_same(self, prompt: int, tokens: list[int]) -> None:
        if tokens != self.greedy[prompt][: len(tokens)]:
            self._reference.assert_same(self.prompts[prompt], tokens)


@pytest.fixture(scope="module")
def expected(model: Path) -> Expected:
    return Expected(model)


class Traffic:
    """An engine and everything that was asked of it."""

    def __init__(self, engine: Engine, expected: Expected, rng: random.Random) -> None:
        self.engine = engine
        self.expected = expected
        self.rng = rng
        self.prompts: dict[RequestKey, int] = {}
        self.goals: dict[RequestKey, int] = {}
        self.tokens: dict[RequestKey, list[int]] = {}

    def _new(self, sibling: Request | None = None) -> Request:
        name = str(len(self.prompts))
        prompt = self.rng.randrange(NUM_PROMPTS) if sibling is None else self.prompts[sibling.key]
        request = make_request(
            name,
            self.expected.prompts[prompt],
            max_tokens=self.rng.randint(1, MAX_TOKENS),
            priority=self.rng.randrange(2) if sibling is None else sibling.priority,
            group=name if sibling is None else sibling.group_id,
        )
        goal = request.sampling.max_tokens
        if self.rng.random() < 0.3:  # it ends before, unforeseen
            stop = self.rng.choice(self.expected.greedy[prompt][:goal])
            goal = self.expected.greedy[prompt].index(stop) + 1
            request = replace(request, sampling=replace(request.sampling, stop_token_ids=(stop,)))
        self.prompts[request.key] = prompt
        self.goals[request.key] = goal
        self.tokens[request.key] = []
        return request

    def _pick(self) -> RequestKey | None:
        live = [key for key in self.prompts if self.engine.state_of(key) is not None]
        return self.rng.choice(live) if live else None

    def arrive(self) -> None:
        if self.engine.stats().num_waiting < 5:
            self.engine.add(self._new())

    def cancel(self) -> None:
        if (key := self._pick()) is not None:
            assert self.engine.abort(key)
            self.goals[key] = len(self.tokens[key])

    def choices(self) -> None:
        """A call with n > 1, whose choices come one by one."""
        first = self._new()
        self.engine.add(first)
        for _ in range(self.rng.randint(1, 3)):
            if self.rng.random() < 0.3:
                self.step()
            self.engine.add(self._new(first))

    def rollback(self) -> None:
        if (key := self._pick()) is not None and self.tokens[key]:
            count = self.rng.randint(1, len(self.tokens[key]))
            self.engine.rollback(key, count)
            del self.tokens[key][-count:]

    def resize(self) -> None:
        missing = NUM_BLOCKS - self.engine.num_blocks
        try:
            if missing:
                self.engine.grow_blocks(missing)
            else:
                self.engine.give_back_blocks(self.rng.randint(1, 4))
        except OutOfBlocks:
            pass

    def step(self) -> bool:
        step = self.engine.step()
        self.engine.check_integrity()
        for output in step.outputs if step is not None else ():
            assert output.error is None
            assert output.offset == len(self.tokens[output.key])
            self.tokens[output.key] += output.token_ids
        return step is not None


def make_random_engine(
    path: Path, kind: str, batching: str, is_pipelined: bool, device: str = "cpu"
) -> Engine:
    """``kind`` says how requests are preempted."""
    config = EngineConfig(
        model_path=str(path),
        dtype="fp32",
        device=device,
        block_size=8,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        max_model_len=72,
        batching="static" if batching == "static" else "continuous",
        swap_bytes=SWAP_BYTES if kind != "recompute" else 0,
    )
    cost = PreemptionCost(
        recompute_s=lambda num_tokens: num_tokens / 40, swap_s=lambda num_blocks: num_blocks**2 / 20
    )
    return build_engine(
        config,
        preemption_cost=cost if kind == "cheaper" else None,
        is_pipelined=is_pipelined,
    )


@pytest.mark.parametrize(
    ("kind", "batching", "is_pipelined"),
    [
        ("recompute", "continuous", False),
        ("recompute", "continuous", True),
        ("cheaper", "continuous", False),
        ("cheaper", "continuous", True),
        ("swap", "static", False),
        ("swap", "continuous", True),
    ],
)
def test_random_traffic_gets_its_reference_tokens_and_leaks_no_block(
    model: Path, expected: Expected, kind: str, batching: str, is_pipelined: bool
) -> None:
    engine = make_random_engine(model, kind, batching, is_pipelined)
    drive(engine, expected, random.Random(f"{kind} {batching}"))
    stats = engine.stats()
    num_recomputed = stats.total_preemptions - stats.total_swap_preemptions
    assert (stats.total_swap_preemptions > 0) == (kind != "recompute")
    assert (stats.total_swapped_in_bytes > 0) == (kind != "recompute")
    assert num_recomputed > 0 or kind != "recompute"
    is_padded = stats.total_prefill_pad_tokens > 0 and stats.total_decode_pad_tokens > 0
    assert is_padded == (batching == "static")


def drive(engine: Engine, expected: Expected, rng: random.Random) -> None:
    """Random traffic to its end: everybody has the expected tokens, and all blocks are free."""
    traffic = Traffic(engine, expected, rng)
    rare: list[Callable[[], None]] = [
        traffic.cancel,
        traffic.choices,
        traffic.choices,
        traffic.rollback,
        traffic.resize,
    ]
    for _ in range(250):
        choice = rng.random()
        if choice < 0.5:
            traffic.arrive()
        elif choice < 0.75:
            rng.choice(rare)()
        traffic.step()
    while traffic.step():
        pass
    assert len(traffic.prompts) > 60
    for key, prompt in traffic.prompts.items():
        assert engine.state_of(key) is None
        assert len(traffic.tokens[key]) == traffic.goals[key]
        expected.assert_same(prompt, traffic.tokens[key])
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks == engine.num_blocks
    assert stats.num_swapped == 0


def test_a_swapped_request_ends_in_its_reference_tokens_without_a_second_prefill(
    model: Path, expected: Expected
) -> None:
    engine = make_engine(
        model, num_blocks=9, max_model_len=64, swap_bytes=SWAP_BYTES, enable_prefix_cache=False
    )
    requests = [make_request(str(i), random_prompt(20, seed=i), max_tokens=25) for i in range(2)]
    tokens: dict[RequestKey, list[int]] = {request.key: [] for request in requests}
    for request in requests:
        engine.add(request)
    was_swapped = False
    while (step := engine.step()) is not None:
        was_swapped |= engine.state_of(requests[1].key) is EngineState.SWAPPED
        for output in step.outputs:
            tokens[output.key] += output.token_ids
    assert was_swapped
    stats = engine.stats()
    assert stats.total_prefill_tokens == 40
    assert stats.total_swap_preemptions == 1
    assert stats.total_swapped_in_bytes == stats.total_swapped_out_bytes > 0
    reference = Reference(model)
    for request in requests:
        reference.assert_same(request.prompt_token_ids, tokens[request.key])


@pytest.mark.parametrize("prefill_s", [0.0, 1e9])
def test_who_is_preempted_is_swapped_only_where_that_is_faster(
    model: Path, prefill_s: float
) -> None:
    engine = make_engine(model, num_blocks=9, max_model_len=64, swap_bytes=SWAP_BYTES)
    engine.set_prefill_cost(lambda num_tokens: prefill_s)
    for i in range(2):
        engine.add(make_request(str(i), random_prompt(20, seed=i), max_tokens=25))
    while engine.step() is not None:
        pass
    stats = engine.stats()
    assert stats.total_preemptions == 1
    assert stats.total_swap_preemptions == (1 if prefill_s else 0)


def test_a_slab_is_given_back_and_taken_again_while_requests_run(model: Path) -> None:
    engine = make_engine(model, num_blocks=40, max_model_len=64, migration_reserve=0.25)
    assert engine.num_blocks == 30
    first = make_request("first", random_prompt(30, seed=1), max_tokens=30)
    second = make_request("second", random_prompt(20, seed=2), max_tokens=30)
    collector = Collector()

    def step() -> bool:
        step = engine.step()
        collector.take(step.outputs if step is not None else ())
        engine.check_integrity()
        return step is not None

    engine.add(first)
    engine.add(second)
    for _ in range(8):
        step()
    assert engine.release(first.key)  # the second one's blocks are not the lowest
    engine.give_back_blocks(20)
    assert engine.stats().num_blocks == 10
    assert engine.pool.layers[0].tensor.shape[0] == 10
    with pytest.raises(OutOfBlocks):
        engine.give_back_blocks(3)  # a request of 64 tokens would fit no more
    engine.grow_blocks(30)
    with pytest.raises(OutOfMemory):
        engine.grow_blocks(1)
    again = make_request("again", random_prompt(20, seed=2), max_tokens=30)
    engine.add(again)
    while step():
        pass
    for request in (second, again):
        Reference(model).assert_same(request.prompt_token_ids, collector.tokens[request.key])
    assert engine.stats().num_free_blocks == 40
