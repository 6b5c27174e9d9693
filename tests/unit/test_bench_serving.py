"""What the benchmark's loop counts, with an engine and a clock that do what the test says."""

import random

import pytest

from bench.serving import Emit, WrongOutput, serve
from bench.workload import OfflineRequest, Workload, mixed, parse_workload, uniform


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s


class OneTokenEach:
    """Prefills everybody new in ``prefill_s``, else decodes everybody in ``decode_s``."""

    def __init__(self, clock: Clock, *, prefill_s: float = 4.0, decode_s: float = 1.0) -> None:
        self._clock = clock
        self._prefill_s = prefill_s
        self._decode_s = decode_s
        self._new: dict[int, int] = {}
        self._running: dict[int, int] = {}

    def add(self, index: int, request: OfflineRequest) -> None:
        self._new[index] = request.output_len

    def step(self, emit: Emit) -> None:
        if self._new:
            self._clock.now_s += self._prefill_s
            computed, self._new = self._new, {}
            self._running |= computed
        else:
            self._clock.now_s += self._decode_s
            computed = dict(self._running)
        emit((index, 1) for index in computed)
        for index in computed:
            self._running[index] -= 1
            if not self._running[index]:
                del self._running[index]


def requests(*shapes: tuple[int, float]) -> list[OfflineRequest]:
    return [OfflineRequest((5, 6, 7), output_len, at_s) for output_len, at_s in shapes]


def test_wall_time_holds_prefill_and_every_step() -> None:
    clock = Clock()
    run = serve(OneTokenEach(clock), requests((3, 0.0), (2, 0.0)), clock=clock, sleep=clock.sleep)
    assert run.num_output_tokens == 5
    assert run.wall_s == 4.0 + 1.0 + 1.0
    assert run.output_tokens_per_s == pytest.approx(5 / 6)
    assert run.decode_steps_s == [1.0, 1.0]
    assert run.decode_step_s == 1.0
    assert run.ttfts_s == [4.0, 4.0]


def test_a_step_that_somebody_waits_in_is_no_decode_step() -> None:
    clock = Clock()
    run = serve(OneTokenEach(clock), requests((4, 0.0), (1, 4.5)), clock=clock, sleep=clock.sleep)
    # Prefill to 4, decode to 5; the second came at 4.5 and is prefilled to 9; decode to 10, 11.
    assert run.wall_s == 11.0
    assert run.decode_steps_s == [1.0, 1.0, 1.0]
    assert run.ttfts_s == [4.0, 4.5]


def test_the_loop_sleeps_until_somebody_arrives() -> None:
    clock = Clock()
    run = serve(OneTokenEach(clock), requests((1, 0.0), (1, 30.0)), clock=clock, sleep=clock.sleep)
    assert clock.slept_s == [26.0]
    assert run.wall_s == 34.0


class TwoTokensAtOnce:
    def add(self, index: int, request: OfflineRequest) -> None:
        pass

    def step(self, emit: Emit) -> None:
        emit([(0, 2)])


def test_a_token_too_many_is_an_error() -> None:
    with pytest.raises(WrongOutput, match="2 tokens for request 0, 1 were due"):
        serve(TwoTokensAtOnce(), requests((1, 0.0)))


def test_prompts_differ_from_run_to_run_and_not_by_seed() -> None:
    workload = uniform(2, 8, 4)

    def prompts(rng: random.Random) -> list[tuple[int, ...]]:
        return [request.prompt_token_ids for request in workload.requests(rng, 50)]

    rng = random.Random(1)
    first, second = prompts(rng), prompts(rng)
    assert first != second
    assert first == prompts(random.Random(1))
    assert {len(prompt) for prompt in first} == {8}
    assert all(3 <= token < 50 for prompt in first for token in prompt)


def test_outputs_can_be_cut_for_a_warm_up() -> None:
    rng = random.Random(1)
    cut = uniform(1, 2, 9).requests(rng, 50, max_output=4)
    assert [request.output_len for request in cut] == [4]
    assert [r.output_len for r in uniform(1, 2, 3).requests(rng, 50, max_output=4)] == [3]


def test_a_mixed_workload_is_always_the_same_and_never_even() -> None:
    workload = mixed(40, 10.0)
    assert workload == mixed(40, 10.0)
    assert not workload.is_uniform
    arrivals = [shape.at_s for shape in workload.shapes]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0
    assert 1.0 < arrivals[-1] < 10.0
    assert len({shape.input_len for shape in workload.shapes}) > 20
    assert all(32 <= shape.input_len <= 768 for shape in workload.shapes)
    assert all(16 <= shape.output_len <= 256 for shape in workload.shapes)


@pytest.mark.parametrize(
    ("text", "workload"),
    [
        ("16x256x128", uniform(16, 256, 128)),
        ("mixed", mixed()),
        ("mixed:8", mixed(8)),
        ("mixed:8:2.5", mixed(8, 2.5)),
    ],
)
def test_workloads_have_names(text: str, workload: Workload) -> None:
    assert parse_workload(text) == workload
    assert parse_workload(workload.name) == workload


@pytest.mark.parametrize("text", ["", "16", "16x256", "0x1x1", "axbxc", "mixed:0", "mixed:8:0"])
def test_a_name_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_workload(text)
