"""The choices of a call with n > 1 are what they would be alone, from one prefill."""

from pathlib import Path

import pytest

from shared.core.request import Request
from shared.engine.engine import Engine
from shared.engine.outputs import KVExport
from tests.engines import Collector, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

PROMPT = random_prompt(200, seed=3)
NUM_CHOICES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


def _choices(*, group: str | None = "call", max_tokens: int = 10) -> list[Request]:
    return [
        make_request(
            str(i), PROMPT, temperature=1.0, seed=i, max_tokens=max_tokens + i, group=group
        )
        for i in range(NUM_CHOICES)
    ]


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, list[int]]:
    """The tokens of each choice, served by itself."""
    tokens: dict[str, list[int]] = {}
    for request in _choices():
        tokens |= run(make_engine(model), request)
    assert len({tuple(own) for own in tokens.values()}) == NUM_CHOICES
    return tokens


def _assert_nothing_is_left(engine: Engine) -> None:
    engine.check_integrity()
    assert engine.stats().num_free_blocks == engine.num_blocks


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("batching", "is_pipelined"), [("continuous", False), ("continuous", True), ("static", False)]
)
@pytest.mark.parametrize("max_num_batched_tokens", [48, 1024])
def test_n_choices_take_one_prefill(
    model: Path,
    alone: dict[str, list[int]],
    batching: str,
    is_pipelined: bool,
    enable_prefix_cache: bool,
    max_num_batched_tokens: int,
) -> None:
    engine = make_engine(
        model,
        is_pipelined=is_pipelined,
        batching=batching,
        enable_prefix_cache=enable_prefix_cache,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=64,
    )
    assert run(engine, *_choices()) == alone
    stats = engine.stats()
    assert stats.total_prefill_tokens == len(PROMPT) + NUM_CHOICES - 1
    assert stats.total_cached_tokens == (NUM_CHOICES - 1) * (len(PROMPT) - 1)
    assert stats.total_prefill_pad_tokens == 0
    _assert_nothing_is_left(engine)


def test_requests_of_different_calls_do_not_wait_for_each_other(model: Path) -> None:
    engine = make_engine(model, num_blocks=128, max_num_batched_tokens=1024)
    for request in _choices(group=None):
        engine.add(request)
    step = engine.step()
    assert step is not None
    assert len(step.outputs) == NUM_CHOICES
    assert step.stats.total_prefill_tokens == NUM_CHOICES * len(PROMPT)


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_cancelling_the_one_that_prefills_leaves_the_others_theirs(
    model: Path, alone: dict[str, list[int]], batching: str, num_steps: int
) -> None:
    engine = make_engine(
        model, max_num_batched_tokens=48, batching=batching, enable_prefix_cache=False
    )
    first, *others = _choices()
    for request in (first, *others):
        engine.add(request)
    for _ in range(num_steps):
        step = engine.step()
        assert step is not None and not step.outputs
    assert engine.abort(first.key)
    collector = Collector()
    while (step := engine.step()) is not None:
        collector.take(step.outputs)
    for request in others:
        assert collector.tokens[request.key] == alone[request.request_id]
    lost = 48 * num_steps
    assert engine.stats().total_prefill_tokens == lost + len(PROMPT) + NUM_CHOICES - 2
    _assert_nothing_is_left(engine)


@pytest.mark.parametrize("is_released_at_once", [True, False])
def test_every_choice_is_handed_over_with_all_its_kv(
    model: Path, alone: dict[str, list[int]], is_released_at_once: bool
) -> None:
    """Prefilled in one engine and decoded in others, as prefill and decode workers do."""
    exports: list[KVExport] = []
    engine = make_engine(
        model, kv_sink=exports.append, enable_prefix_cache=False, max_num_batched_tokens=48
    )
    choices = _choices()
    for request in choices:
        engine.add(request, prefill_only=True, export=True)
    collector = Collector()
    while (step := engine.step()) is not None:
        collector.take(step.outputs)
        for output in step.outputs:
            if is_released_at_once:
                assert engine.release(output.key)
    assert engine.stats().total_prefill_tokens == len(PROMPT) + NUM_CHOICES - 1
    for request in choices:
        assert engine.release(request.key) is not is_released_at_once
        other = make_engine(model)
        other.reserve(request.key, request.num_tokens)
        own = [export for export in exports if export.key == request.key]
        for export in own:
            heads = other.layout.layers[export.layer].num_kv_heads
            other.import_kv(
                request.key, export.layer, export.block_lo, export.block_hi, 0, heads, export.data
            )
        (token,) = collector.tokens[request.key]
        handed_over = make_request(
            request.request_id,
            PROMPT,
            output=[token],
            temperature=1.0,
            seed=request.sampling.seed,
            max_tokens=request.sampling.max_tokens,
        )
        other.start_reserved(handed_over, num_computed_tokens=len(PROMPT))
        rest = Collector()
        while (step := other.step()) is not None:
            rest.take(step.outputs, first_offset=1)
        assert [token, *rest.tokens[request.key]] == alone[request.request_id]
    _assert_nothing_is_left(engine)
