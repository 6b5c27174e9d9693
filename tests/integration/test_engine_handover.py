"""One engine begins a request and another one ends it; nothing is missing and nothing is twice."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.core.device_group import DeviceGroup
from shared.core.request import Request, RequestKey
from shared.engine.engine import Engine
from shared.engine.outputs import KVExport
from shared.errors import EngineError, LifecycleError, OutOfBlocks
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

BLOCK_SIZE = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("llama-gqa", "mistral-window", "opt")
    return {name: write_model(folder / name, FAMILIES[name]) for name in names}


def _prefill(engine: Engine, request: Request) -> list[int]:
    """Run ``request`` up to its first new token, after which it must be held."""
    engine.add(request, prefill_only=True, export=True)
    tokens: list[int] = []
    while (step := engine.step()) is not None:
        for output in step.outputs:
            assert output.error is None
            assert output.offset == len(request.output_token_ids)
            tokens += output.token_ids
    assert engine.state_of(request.key) == "held"
    return tokens


def _deliver(engine: Engine, key: RequestKey, exports: list[KVExport]) -> None:
    """Import in whatever order, one head at a time."""
    for export in random.Random(5).sample(exports, len(exports)):
        num_heads = engine.layout.layers[export.layer].num_kv_heads
        heads = export.data.reshape(export.block_hi - export.block_lo, num_heads, -1)
        for head in range(num_heads):
            engine.import_kv(
                key,
                export.layer,
                export.block_lo,
                export.block_hi,
                head,
                head + 1,
                np.ascontiguousarray(heads[:, head]).tobytes(),
            )


def _finish(engine: Engine, tokens: list[int]) -> list[int]:
    collector = Collector()
    while (step := engine.step()) is not None:
        collector.take(step.outputs, first_offset=len(tokens))
    (end,) = collector.ends.values()
    assert end.error is None
    return tokens + collector.tokens[end.key]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "opt"])
def test_prefill_here_and_decode_there(
    models: dict[str, Path], family: str, temperature: float
) -> None:
    exports: list[KVExport] = []
    first = make_engine(models[family], kv_sink=exports.append)
    second = make_engine(models[family])
    run(second, make_request("company", random_prompt(20, seed=9)))  # other blocks in use before
    prompt = random_prompt(35, seed=1)
    request = make_request("a", prompt, temperature=temperature, seed=77)

    reservation = second.reserve(request.key, request.num_tokens)
    assert (reservation.num_blocks, reservation.num_cached_tokens) == (6, 0)
    tokens = _prefill(first, request)
    _deliver(second, request.key, exports)
    assert first.release(request.key)
    handed_over = make_request("a", prompt, output=tokens, temperature=temperature, seed=77)
    second.start_reserved(handed_over, num_computed_tokens=len(prompt))
    prefilled_before = second.stats().total_prefill_tokens
    tokens = _finish(second, tokens)

    assert second.stats().total_prefill_tokens == prefilled_before
    alone = run(make_engine(models[family]), request)["a"]
    assert tokens == alone
    if temperature == 0.0:
        Reference(models[family]).assert_same(prompt, tokens)
    for engine in (first, second):
        engine.check_integrity()
        assert engine.stats().num_free_blocks == engine.num_blocks


def test_every_block_of_every_layer_is_exported_once(models: dict[str, Path]) -> None:
    exports: list[KVExport] = []
    engine = make_engine(models["llama-gqa"], kv_sink=exports.append)
    prompt = random_prompt(35, seed=1)
    run(engine, make_request("warm", prompt[:20], max_tokens=1))  # two blocks are cached now
    request = make_request("a", prompt)
    _prefill(engine, request)
    assert engine.stats().total_cached_tokens == 16
    for layer in range(3):
        mine = [export for export in exports if export.layer == layer]
        assert [block for e in mine for block in range(e.block_lo, e.block_hi)] == list(range(5))
        assert [e.is_last_chunk for e in mine] == [False] * (len(mine) - 1) + [True]
        for export in mine:
            size = engine.layout.block_bytes(layer) * (export.block_hi - export.block_lo)
            assert export.data.nbytes == size
            current = engine.export_kv(request.key, layer, export.block_lo, export.block_hi)
            assert np.array_equal(export.data, current)
            assert not np.shares_memory(export.data, current)


def test_export_goes_with_a_request_that_decodes_here_too(models: dict[str, Path]) -> None:
    exports: list[KVExport] = []
    engine = make_engine(models["llama-gqa"], kv_sink=exports.append)
    request = make_request("a", random_prompt(12, seed=1))
    engine.add(request, export=True)
    tokens = _finish(engine, [])
    assert len(tokens) == 16
    # The prefill's two blocks, the second one partial; what decoding adds is not exported.
    assert {(e.block_lo, e.block_hi) for e in exports} == {(0, 2)}
    assert len(exports) == 3


def test_a_prefill_goes_on_behind_a_prefix_from_elsewhere(models: dict[str, Path]) -> None:
    exports: list[KVExport] = []
    first = make_engine(models["llama-gqa"])
    second = make_engine(models["llama-gqa"], kv_sink=exports.append)
    prompt = random_prompt(35, seed=1)
    donor = make_request("donor", prompt[:24], max_tokens=8)
    first.add(donor, prefill_only=True)
    while first.step() is not None:
        pass

    request = make_request("a", prompt)
    second.reserve(request.key, request.num_tokens)
    for layer in range(3):
        data = first.export_kv(donor.key, layer, 0, 3)
        second.import_kv(request.key, layer, 0, 3, 0, 2, data)
    second.start_reserved(request, num_computed_tokens=24, export=True)
    Reference(models["llama-gqa"]).assert_same(prompt, _finish(second, []))
    assert second.stats().total_prefill_tokens == 11
    for layer in range(3):
        ranges = [(e.block_lo, e.block_hi) for e in exports if e.layer == layer]
        assert ranges == [(0, 5)]
    # What was imported can be found by others.
    assert second.num_cached_tokens(make_request("b", prompt)) == 32


def test_a_reservation_takes_what_is_cached_here(models: dict[str, Path]) -> None:
    engine = make_engine(models["llama-gqa"])
    prompt = random_prompt(35, seed=1)
    alone = run(engine, make_request("warm", prompt))["warm"]
    request = make_request("a", prompt)
    reservation = engine.reserve(request.key, 35, prefix_of=request)
    assert (reservation.num_blocks, reservation.num_cached_tokens) == (6, 32)
    with pytest.raises(ValueError, match=r"\[4, 6\) are to be imported"):
        engine.import_kv(request.key, 0, 3, 4, 0, 2, bytes(engine.layout.block_bytes(0)))
    engine.start_reserved(request, num_computed_tokens=32)
    assert _finish(engine, []) == alone


def test_head_ranges_are_contiguous_pieces_of_a_block(models: dict[str, Path]) -> None:
    engine = make_engine(models["llama-gqa"])
    request = make_request("a", random_prompt(12, seed=1))
    engine.add(request, prefill_only=True)
    while engine.step() is not None:
        pass
    layout = engine.layout
    whole = engine.export_kv(request.key, 1, 0, 2)
    for head in range(2):
        piece = engine.export_kv(request.key, 1, 0, 2, head, head + 1)
        assert piece.nbytes == 2 * layout.head_bytes(1)
        for block in range(2):
            start = block * layout.block_bytes(1) + head * layout.head_bytes(1)
            expected = whole[start : start + layout.head_bytes(1)]
            got = piece[block * layout.head_bytes(1) :][: layout.head_bytes(1)]
            assert np.array_equal(got, expected)


def test_the_head_ranges_of_a_group_are_together_the_whole_kv(models: dict[str, Path]) -> None:
    first, second = make_engine(models["opt"]), make_engine(models["opt"])
    assert first.group.size == 1
    assert first.group.head_range(0, 4) == (0, 4)
    group = DeviceGroup(("cuda:0", "cuda:1"))
    request = make_request("a", random_prompt(20, seed=1))
    first.add(request, prefill_only=True)
    while (step := first.step()) is not None:
        tokens = [token for output in step.outputs for token in output.token_ids]
    second.reserve(request.key, 20)
    for layer, kv in enumerate(first.layout.layers):
        for rank in reversed(range(group.size)):
            heads = group.head_range(rank, kv.num_kv_heads)
            data = first.export_kv(request.key, layer, 0, 3, *heads)
            assert data.nbytes == 3 * 2 * first.layout.head_bytes(layer)
            second.import_kv(request.key, layer, 0, 3, *heads, data)
    resumed = replace(request, output_token_ids=tuple(tokens))
    second.start_reserved(resumed, num_computed_tokens=20)
    for layer in range(first.layout.num_layers):
        whole = first.export_kv(request.key, layer, 0, 3)
        assert np.array_equal(second.export_kv(request.key, layer, 0, 3), whole)
    Reference(models["opt"]).assert_same(request.prompt_token_ids, _finish(second, tokens))


def test_imports_that_do_not_fit_are_refused(models: dict[str, Path]) -> None:
    engine = make_engine(models["llama-gqa"])
    key = RequestKey("a", 0)
    block = bytes(engine.layout.block_bytes(0))
    with pytest.raises(LifecycleError):
        engine.import_kv(key, 0, 0, 1, 0, 2, block)
    engine.reserve(key, 16)
    for wrong in (
        (0, 0, 1, 0, 2, block[:-1]),
        (0, 0, 2, 0, 2, block),
        (0, 0, 1, 0, 3, block),
        (0, 0, 1, 1, 1, block),
        (3, 0, 1, 0, 2, block),
        (0, 3, 4, 0, 2, block),
        (0, -1, 0, 0, 2, block),
    ):
        with pytest.raises(ValueError, match="of"):
            engine.import_kv(key, *wrong)
    engine.import_kv(key, 0, 0, 1, 0, 2, block)
    engine.import_kv(key, 0, 1, 2, 0, 2, memoryview(block))
    with pytest.raises(OutOfBlocks):
        for i in range(99):
            engine.reserve(RequestKey("b", i), 200)
    with pytest.raises(EngineError, match="without a KV sink"):
        engine.add(make_request("c", [5, 6]), export=True)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("num_emitted", [1, 7, 15])
def test_a_new_attempt_goes_on_where_the_old_one_ended(
    models: dict[str, Path], num_emitted: int, temperature: float
) -> None:
    prompt = random_prompt(21, seed=4)
    whole = run(
        make_engine(models["llama-gqa"]),
        make_request("a", prompt, temperature=temperature, seed=123),
    )["a"]
    again = make_request(
        "a",
        prompt,
        output=whole[:num_emitted],
        attempt=1,
        temperature=temperature,
        seed=123,
    )
    company = [
        make_request(
            f"other {i}", random_prompt(10 + i, seed=i), output=[5] * num_emitted, temperature=1.0
        )
        for i in range(3)
    ]
    resumed = run(make_engine(models["llama-gqa"]), *company, again)["a"]
    assert whole[:num_emitted] + resumed == whole
