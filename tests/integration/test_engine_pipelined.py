"""One step in flight: the next decode is launched before the tokens of this one are known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from shared.core.batch_plan import Chunk
from shared.core.request import Request, RequestKey
from shared.engine.engine import Engine
from shared.engine.flight import Flight, Landed
from shared.engine.outputs import KVExport, KVSink, RequestOutput, StepOutput
from shared.engine.runner import ModelRunner
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


def _step(engine: Engine) -> StepOutput:
    step = engine.step()
    assert step is not None
    engine.check_integrity()
    return step


def _sampled(name: str, seed: int, **sampling: Any) -> Request:
    request = make_request(name, random_prompt(5 + 3 * seed, seed=seed), max_tokens=12 - seed)
    return replace(request, sampling=replace(request.sampling, seed=seed, **sampling))


def _is_finite(engine: Engine) -> bool:
    return all(bool(layer.tensor.isfinite().all()) for layer in engine.pool.layers)


def _outputs(engine: Engine, requests: list[Request]) -> dict[RequestKey, list[RequestOutput]]:
    """Everything that comes out, with some requests arriving while others run."""
    outputs: dict[RequestKey, list[RequestOutput]] = {r.key: [] for r in requests}
    waiting = list(requests)
    while (step := engine.step()) is not None or waiting:
        if waiting:
            engine.add(waiting.pop(0))
        for output in step.outputs if step is not None else ():
            outputs[output.key].append(output)
    assert engine.stats().num_free_blocks == engine.num_blocks
    return outputs


def test_what_comes_out_is_the_same_as_without(model: Path) -> None:
    greedy = _sampled("greedy", 0)
    stop = run(make_engine(model), greedy)["greedy"][5]
    requests = [
        greedy,
        _sampled("sampled", 1, temperature=1.0, top_p=0.9, logprobs=3),
        _sampled("stopped", 0, stop_token_ids=(stop,)),
        _sampled("not yet", 0, stop_token_ids=(stop,), min_tokens=8),
        _sampled("biased", 2, temperature=0.7, logit_bias=((7, 3.0),), logprobs=0),
        _sampled("penalised", 3, frequency_penalty=0.5, repetition_penalty=1.3),
        _sampled("sampled too", 4, temperature=1.3, top_k=20, min_p=0.01),
    ]
    plain, pipelined = (
        _outputs(make_engine(model, max_num_seqs=4, is_pipelined=is_pipelined), requests)
        for is_pipelined in (False, True)
    )
    for request in requests:
        ours, expected = pipelined[request.key], plain[request.key]
        for which in ("offset", "token_ids", "finish_reason", "num_cached_tokens"):
            assert [getattr(output, which) for output in ours] == [
                getattr(output, which) for output in expected
            ]
        for output, other in zip(ours, expected, strict=True):
            for one, another in zip(output.logprobs, other.logprobs, strict=True):
                assert one.top_ids == another.top_ids
                assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
                assert one.top_logprobs == pytest.approx(another.top_logprobs, abs=1e-4)
    stopped, not_yet = (plain[request.key] for request in requests[2:4])
    assert stopped[-1].finish_reason == "stop" and len(stopped) <= 6
    assert len(not_yet) > 8


def test_one_that_ends_unforeseen_keeps_its_blocks_while_they_are_written(model: Path) -> None:
    engine = make_engine(model, is_pipelined=True, enable_prefix_cache=False)
    request = _sampled("a", 0)
    tokens = run(engine, request)["a"]
    first = tokens.index(tokens[3])
    sampling = replace(request.sampling, stop_token_ids=(tokens[3],))
    stopped = replace(request, request_id="b", sampling=sampling)
    before = engine.stats()
    engine.add(stopped)
    for position in range(first + 1):
        (output,) = _step(engine).outputs
        assert output.token_ids == (tokens[position],)
    assert output.finish_reason == "stop"
    assert engine.state_of(stopped.key) is None
    assert engine.stats().num_free_blocks < engine.num_blocks
    assert _step(engine).outputs == ()
    stats = engine.stats()
    assert stats.num_free_blocks == engine.num_blocks
    assert engine.step() is None
    # What was computed in vain is not counted.
    assert stats.total_decode_tokens - before.total_decode_tokens == first
    assert stats.total_prefill_tokens - before.total_prefill_tokens == 5


def test_one_that_reaches_its_length_is_not_computed_in_vain(model: Path) -> None:
    engine = make_engine(model, is_pipelined=True)
    engine.add(make_request("a", random_prompt(5, seed=1), max_tokens=4))
    outputs = [_step(engine).outputs for _ in range(4)]
    assert [len(output) for output in outputs] == [1] * 4
    assert engine.stats().num_free_blocks == engine.num_blocks
    assert engine.step() is None


def test_a_cancelled_request_says_nothing_more_and_may_come_again_at_once(model: Path) -> None:
    engine = make_engine(model, num_blocks=8, max_model_len=48, is_pipelined=True)
    stays = make_request("stays", random_prompt(10, seed=1))
    goes = make_request("goes", random_prompt(10, seed=2))
    collector, again = Collector(), Collector()
    engine.add(stays)
    engine.add(goes)
    for _ in range(5):
        collector.take(_step(engine).outputs)
    assert engine.abort(goes.key)
    assert engine.state_of(goes.key) is None
    num_tokens = len(collector.tokens.pop(goes.key))
    assert num_tokens >= 2
    engine.add(goes)  # with the token of its first life in flight
    while (step := engine.step()) is not None:
        collector.take(o for o in step.outputs if o.key == stays.key)
        again.take(o for o in step.outputs if o.key == goes.key)
        engine.check_integrity()
    reference = Reference(model)
    reference.assert_same(stays.prompt_token_ids, collector.tokens[stays.key])
    reference.assert_same(goes.prompt_token_ids, again.tokens[goes.key])
    assert engine.stats().num_free_blocks == engine.num_blocks


def test_who_comes_is_admitted_after_what_is_in_flight(model: Path) -> None:
    engine = make_engine(model, is_pipelined=True)
    engine.add(make_request("runs", random_prompt(6, seed=1), max_tokens=40))
    for _ in range(4):
        _step(engine)
    comes = make_request("comes", random_prompt(6, seed=2))
    engine.add(comes)
    assert _step(engine).stats.num_waiting == 1
    keys = [output.key for output in _step(engine).outputs]
    assert comes.key in keys


def test_nobody_waits_longer_for_a_share_of_the_budget(model: Path) -> None:
    engine = make_engine(model, is_pipelined=True, max_num_batched_tokens=12)
    requests = [make_request(str(i), random_prompt(6, seed=i), max_tokens=30) for i in range(4)]
    for request in requests:
        engine.add(request)  # two fill the budget
    collector = Collector()
    while len(collector.tokens) < len(requests):
        collector.take(_step(engine).outputs)
    assert all(len(tokens) < 6 for tokens in collector.tokens.values())


def test_tokens_are_taken_back_while_the_next_one_is_in_flight(model: Path) -> None:
    engine = make_engine(model, is_pipelined=True)
    requests = [make_request(str(i), random_prompt(6, seed=i), max_tokens=30) for i in range(2)]
    tokens: dict[RequestKey, list[int]] = {request.key: [] for request in requests}
    for request in requests:
        engine.add(request)
    first = requests[0].key
    is_rolled_back = False
    while (step := engine.step()) is not None:
        engine.check_integrity()
        for output in step.outputs:
            assert output.offset == len(tokens[output.key])
            tokens[output.key] += output.token_ids
        if len(tokens[first]) == 13 and not is_rolled_back:
            engine.rollback(first, 9)  # more than a block of eight
            del tokens[first][-9:]
            is_rolled_back = True
    assert is_rolled_back
    for request in requests:
        Reference(model).assert_same(request.prompt_token_ids, tokens[request.key])
    assert engine.stats().num_free_blocks == engine.num_blocks


def test_what_was_computed_in_vain_poisons_nobody(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-mha"])
    file = path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    poison = 200
    weights["model.embed_tokens.weight"][poison] = torch.nan
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    engine = make_engine(path, num_blocks=8, max_model_len=64, is_pipelined=True)
    bad = make_request("bad", random_prompt(10, seed=1))
    # It ends with the token whose embedding is not a number, and that is in flight already.
    sampling = replace(bad.sampling, logit_bias=((poison, 1e4),), stop_token_ids=(poison,))
    engine.add(replace(bad, sampling=sampling))
    (output,) = _step(engine).outputs
    assert output.finish_reason == "stop"
    assert not _is_finite(engine)
    healthy = [make_request(str(i), random_prompt(10, seed=i), max_tokens=20) for i in (2, 3)]
    for request in healthy:
        engine.add(request)
    assert _step(engine).outputs == ()
    assert _is_finite(engine)
    collector = Collector()  # together they take all blocks
    while (step := engine.step()) is not None:
        collector.take(step.outputs)
    for request in healthy:
        Reference(path).assert_same(request.prompt_token_ids, collector.tokens[request.key])
    assert engine.stats().total_failed == 0
    assert engine.stats().num_free_blocks == engine.num_blocks


def test_exported_kv_is_the_same_as_without(model: Path) -> None:
    exported = []
    for is_pipelined in (False, True):
        exports: list[KVExport] = []
        engine = make_engine(model, kv_sink=exports.append, is_pipelined=is_pipelined)
        engine.add(make_request("goes on", random_prompt(20, seed=1)), export=True)
        engine.add(make_request("is held", random_prompt(12, seed=2)), prefill_only=True)
        collector = Collector()
        while (step := engine.step()) is not None:
            collector.take(step.outputs)
        assert [len(tokens) for tokens in collector.tokens.values()] == [16, 1]
        assert engine.stats().num_held == 1
        exported.append([(e.layer, e.block_lo, e.block_hi, e.data.tobytes()) for e in exports])
    assert exported[0] == exported[1]
    assert exported[0]


@dataclass(kw_only=True)
class _DraftedFlight(Flight):
    """Behind each token come up to two of the draft that agree with it, as if just verified."""

    drafts: Mapping[RequestKey, Sequence[int]]

    def land(self) -> Landed:
        landed = super().land()
        for chunk in (chunk for part in self.parts for chunk in part.chunks):
            position = chunk.end - chunk.request.num_prompt_tokens
            count = (3, 2, 1, 1, 2)[position % 5]
            accepted = tuple(self.drafts[chunk.key][position : position + count])
            if landed.token_ids[chunk.key] == accepted[:1]:
                landed.token_ids[chunk.key] = accepted
        return landed


class _DraftingRunner(ModelRunner):
    """A runner that gives up to three tokens a step where it knows what will come."""

    drafts: Mapping[RequestKey, Sequence[int]] = {}

    def launch(self, chunks: Sequence[Chunk], kv_sink: KVSink | None) -> Flight:
        flight = super().launch(chunks, kv_sink)
        return _DraftedFlight(flight.parts, flight.errors, drafts=self.drafts)

    def launch_behind(self, flight: Flight, chunks: Sequence[Chunk]) -> Flight | None:
        ahead = super().launch_behind(flight, chunks)
        return ahead and _DraftedFlight(ahead.parts, ahead.errors, drafts=self.drafts)


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_several_tokens_of_a_step_are_all_committed(
    model: Path, is_pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        make_request(str(seed), random_prompt(6 + seed, seed=seed), max_tokens=30 - seed)
        for seed in range(3)
    ]
    reference = Reference(model)
    drafts = {
        request.key: reference.greedy(request.prompt_token_ids, request.sampling.max_tokens)
        for request in requests
    }
    drafts[requests[2].key][9:] = [0] * 18  # from there on the draft is wrong
    monkeypatch.setattr(_DraftingRunner, "drafts", drafts)
    monkeypatch.setattr("shared.engine.engine.ModelRunner", _DraftingRunner)
    engine = make_engine(model, is_pipelined=is_pipelined)
    collector = Collector()
    for request in requests:
        engine.add(request)
    most = 0
    while (step := engine.step()) is not None:
        engine.check_integrity()
        collector.take(step.outputs)
        most = max(most, *(len(output.token_ids) for output in step.outputs), 0)
    assert most == 3
    for request in requests:
        tokens = collector.tokens[request.key]
        assert len(tokens) == request.sampling.max_tokens
        reference.assert_same(request.prompt_token_ids, tokens)
    assert engine.stats().num_free_blocks == engine.num_blocks
