"""Requests that end early, fail or go back, next to others that must not notice."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shared.core.request import RequestKey
from shared.engine.attention import AttentionBatch, TorchAttention
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.model import load_model
from shared.engine.outputs import KVExport
from shared.errors import InvalidRequest, LifecycleError
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, VOCAB_SIZE, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-mha"])


def _drain(engine: Engine, collector: Collector) -> Collector:
    while (step := engine.step()) is not None:
        collector.take(step.outputs)
    engine.check_integrity()
    return collector


def test_an_aborted_request_says_nothing_more_and_gives_its_blocks_back(model: Path) -> None:
    engine = make_engine(model)
    stays = make_request("stays", random_prompt(10, seed=1))
    goes = make_request("goes", random_prompt(10, seed=2))
    engine.add(stays)
    engine.add(goes)
    collector = Collector()
    for _ in range(5):
        step = engine.step()
        assert step is not None
        collector.take(step.outputs)
    assert engine.abort(goes.key)
    num_tokens = len(collector.tokens[goes.key])
    assert 0 < num_tokens < 16
    _drain(engine, collector)
    assert len(collector.tokens[goes.key]) == num_tokens
    Reference(model).assert_same(stays.prompt_token_ids, collector.tokens[stays.key])
    assert engine.stats().num_free_blocks == engine.num_blocks
    assert not engine.abort(goes.key)


def test_release_works_in_every_state(model: Path) -> None:
    engine = make_engine(model, max_num_seqs=1)
    keys = {name: RequestKey(name, 0) for name in ("held", "running", "waiting", "reserved")}
    engine.add(make_request("held", random_prompt(10, seed=1)), prefill_only=True)
    assert engine.step() is not None
    engine.add(make_request("running", random_prompt(10, seed=2), max_tokens=400))
    engine.add(make_request("waiting", random_prompt(10, seed=3)))
    assert engine.step() is not None
    engine.reserve(keys["reserved"], 20)
    for name, key in keys.items():
        assert engine.state_of(key) == name
    stats = engine.stats()
    assert (stats.num_held, stats.num_running, stats.num_waiting, stats.num_reserved) == (1,) * 4
    for key in keys.values():
        assert engine.release(key)
        assert engine.state_of(key) is None
        engine.check_integrity()
    assert engine.stats().num_free_blocks == engine.num_blocks
    assert engine.step() is None


def test_a_poisoned_request_fails_and_its_blocks_poison_nobody(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-mha"])
    file = path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    poison = 200
    weights["model.embed_tokens.weight"][poison] = torch.nan
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    engine = make_engine(path, num_blocks=12)
    healthy = [make_request(str(i), random_prompt(10, seed=i)) for i in range(2)]
    assert all(poison not in request.prompt_token_ids for request in healthy)
    bad = make_request("bad", [*random_prompt(20, seed=5), poison, 9])
    for request in (healthy[0], bad):
        engine.add(request)
    collector = _drain(engine, Collector())
    error = collector.ends[bad.key].error
    assert error is not None
    assert "not finite" in error
    assert engine.stats().total_failed == 1
    assert engine.stats().num_free_blocks == 12
    assert engine.num_cached_tokens(bad) == 0
    # Eleven blocks are needed at once, so those of the failed one are among them.
    later = [make_request(f"later {i}", random_prompt(28, seed=i), max_tokens=12) for i in (7, 8)]
    tokens = run(engine, *later, healthy[1])
    reference = Reference(path)
    for request in (*later, healthy[1]):
        reference.assert_same(request.prompt_token_ids, tokens[request.request_id])
    reference.assert_same(healthy[0].prompt_token_ids, collector.tokens[healthy[0].key])


class _Faulty(TorchAttention):
    """Attention whose last layer breaks when a request reaches a certain length."""

    def forward(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        batch: AttentionBatch,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if layer == 2 and 23 in batch.context_lens:
            raise RuntimeError("broken at 23")
        return super().forward(layer, query, key, value, scaling=scaling, batch=batch)


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_when_a_batch_breaks_only_the_guilty_fails(model: Path, is_pipelined: bool) -> None:
    chain = load_model(model, dtype="fp32", device="cpu")
    pool = KVPool(chain.spec.kv_layout(8), 64, chain.device)
    config = EngineConfig(model_path=str(model), max_num_seqs=8, max_num_batched_tokens=64)
    exports: list[KVExport] = []
    engine = Engine(
        chain,
        pool,
        config,
        kv_sink=exports.append,
        backend=_Faulty(pool, chain.spec.sliding_windows),
        is_pipelined=is_pipelined,
    )
    guilty = make_request("guilty", random_prompt(20, seed=1))
    fine = make_request("fine", random_prompt(30, seed=2), max_tokens=12)
    exported = make_request("exported", random_prompt(40, seed=3), max_tokens=12)
    engine.add(guilty)
    engine.add(fine)
    collector = Collector()
    for _ in range(3):
        step = engine.step()
        assert step is not None
        collector.take(step.outputs)
    engine.add(exported, export=True)  # its prefill is in the batch that breaks
    _drain(engine, collector)
    assert collector.ends[guilty.key].error == "RuntimeError: broken at 23"
    assert len(collector.tokens[guilty.key]) == 3
    for request in (fine, exported):
        Reference(model).assert_same(request.prompt_token_ids, collector.tokens[request.key])
    assert [(e.layer, e.block_lo, e.block_hi) for e in exports] == [(i, 0, 5) for i in range(3)]
    assert engine.stats().num_free_blocks == engine.num_blocks


def test_a_failing_sink_fails_the_request_whose_kv_it_was_given(model: Path) -> None:
    def sink(export: KVExport) -> None:
        if export.key.request_id == "bad" and export.layer == 1:
            raise OSError("nobody listens")

    engine = make_engine(model, kv_sink=sink)
    good = make_request("good", random_prompt(12, seed=1))
    bad = make_request("bad", random_prompt(12, seed=2))
    engine.add(bad, export=True)
    engine.add(good, export=True)
    collector = _drain(engine, Collector())
    assert collector.ends[bad.key].error == "the KV sink failed: OSError: nobody listens"
    assert collector.tokens[bad.key] == []
    Reference(model).assert_same(good.prompt_token_ids, collector.tokens[good.key])


def test_rolled_back_tokens_are_generated_again(model: Path) -> None:
    engine = make_engine(model)
    request = make_request("a", random_prompt(13, seed=6), max_tokens=12)
    engine.add(request)
    tokens: list[int] = []
    for _ in range(8):
        step = engine.step()
        assert step is not None
        tokens += [token for output in step.outputs for token in output.token_ids]
    engine.rollback(request.key, 5)
    again = tokens[:-5]
    while (step := engine.step()) is not None:
        for output in step.outputs:
            assert output.offset == len(again)
            again += output.token_ids
    assert again[: len(tokens)] == tokens
    Reference(model).assert_same(request.prompt_token_ids, again)
    engine.check_integrity()
    with pytest.raises(LifecycleError):
        engine.rollback(request.key, 1)


def test_what_the_model_cannot_take_is_refused(model: Path) -> None:
    engine = make_engine(model)
    for bad in ([VOCAB_SIZE], [-1, 3]):
        with pytest.raises(InvalidRequest, match=r"token ids must be in \[0, 256\)"):
            engine.add(make_request("a", bad))
    with pytest.raises(InvalidRequest):
        engine.add(make_request("a", random_prompt(512, seed=1)))
    assert engine.step() is None


def test_the_context_is_used_up_to_its_end(model: Path) -> None:
    engine = make_engine(model, max_model_len=24)
    engine.add(make_request("a", random_prompt(20, seed=1), max_tokens=100))
    collector = _drain(engine, Collector())
    (end,) = collector.ends.values()
    assert end.finish_reason == "length"
    assert len(collector.tokens[end.key]) == 4


def test_gathered_kv_is_what_was_written() -> None:
    # Attention over a scattered block table against plain attention over the same numbers.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for window in (None, 5):
        pool = KVPool(
            KVLayout(layers=(LayerKV(2, 16),), block_size=4, dtype="fp32"), 9, torch.device("cpu")
        )
        backend = TorchAttention(pool, (window,))
        table, length = [7, 2, 5], 11
        query, key, value = random(length, 4, 16), random(length, 2, 16), random(length, 2, 16)
        outputs = []
        for start, end in ((0, 3), (3, 9), (9, 10), (10, 11)):
            positions = torch.arange(start, end)
            batch = AttentionBatch(
                positions=positions,
                slot_mapping=torch.tensor([table[p // 4] * 4 + p % 4 for p in range(start, end)]),
                cu_seqlens_q=[0, end - start],
                context_lens=[end],
                block_tables=[table],
                backend=backend,
            )
            rows = slice(start, end)
            outputs.append(
                backend.forward(0, query[rows], key[rows], value[rows], scaling=0.3, batch=batch)
            )
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * 0.3
        i, j = torch.arange(length)[:, None], torch.arange(length)
        hidden = (j > i) | (j <= i - (window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1))
        torch.testing.assert_close(torch.cat(outputs), expected)
