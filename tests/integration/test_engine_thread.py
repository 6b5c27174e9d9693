"""The engine in its thread: calls, outputs, idling, ends."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.outputs import RequestOutput, StepOutput
from shared.engine.thread import EngineThread, Progress
from shared.errors import EngineError, InvalidRequest, LifecycleError, Refused, UnsupportedModel
from tests.engines import Collector, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


class _Client:
    """What a worker does with an engine thread, without an event loop."""

    def __init__(
        self, model: Path, *, max_pending_calls: int = 64, is_pipelined: bool | None = None
    ) -> None:
        config = EngineConfig(
            model_path=str(model), dtype="fp32", device="cpu", block_size=8, num_blocks=64
        )
        self.collector = Collector()
        self.ended = threading.Condition()
        self.progress: list[float] = []
        self.fatal: Future[BaseException] = Future()
        self.thread = EngineThread(
            lambda progress: build_engine(config, is_pipelined=is_pipelined, on_progress=progress),
            on_output=self._take,
            on_fatal=self.fatal.set_result,
            on_progress=lambda what, fraction: self.progress.append(fraction),
            num_threads=1,
            max_pending_calls=max_pending_calls,
        )

    def _take(self, step: StepOutput) -> None:
        with self.ended:
            self.collector.take(step.outputs)
            self.ended.notify_all()

    def wait_for_end(self, request_id: str) -> RequestOutput:
        with self.ended:
            ends = self.collector.ends
            assert self.ended.wait_for(
                lambda: any(key.request_id == request_id for key in ends), TIMEOUT_S
            )
            return next(end for key, end in ends.items() if key.request_id == request_id)


def _add(name: str, length: int = 10) -> Callable[[Engine], None]:
    return lambda engine: engine.add(make_request(name, random_prompt(length, seed=length)))


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_requests_come_in_between_iterations_and_wake_an_idle_engine(
    model: Path, is_pipelined: bool
) -> None:
    client = _Client(model, is_pipelined=is_pipelined)
    info = client.thread.start().result(TIMEOUT_S)
    assert (info.num_blocks, info.max_model_len, info.layout.block_size) == (64, 512, 8)
    assert info.spec.num_layers == 3
    assert client.progress == sorted(client.progress)
    assert client.progress[-1] == 1.0
    for name in ("first", "second"):  # the engine is idle before each
        client.thread.call(_add(name)).result(TIMEOUT_S)
        assert client.wait_for_end(name).finish_reason == "length"
    expected = run(make_engine(model), make_request("a", random_prompt(10, seed=10)))["a"]
    assert list(client.collector.tokens.values()) == [expected, expected]
    assert client.thread.stop(TIMEOUT_S)
    assert not client.fatal.done()


def test_calls_run_in_order_in_the_engine_s_thread(model: Path) -> None:
    client = _Client(model)

    def where(index: int) -> Callable[[Engine], tuple[int, int]]:
        return lambda _: (index, threading.get_ident())

    futures = [client.thread.call(where(index)) for index in range(9)]
    order: list[int] = []
    for future in futures:
        future.add_done_callback(lambda done: order.append(done.result()[0]))
    client.thread.start()
    results = [future.result(TIMEOUT_S) for future in futures]
    assert order == [index for index, _ in results] == list(range(9))
    assert {ident for _, ident in results} != {threading.get_ident()}
    assert len({ident for _, ident in results}) == 1
    assert client.thread.call(lambda _: torch.get_num_threads()).result(TIMEOUT_S) == 1
    client.thread.stop(TIMEOUT_S)


def test_an_error_in_a_call_is_the_caller_s(model: Path) -> None:
    client = _Client(model)
    client.thread.start()
    with pytest.raises(InvalidRequest):
        client.thread.call(lambda engine: engine.add(make_request("a", []))).result(TIMEOUT_S)
    client.thread.call(_add("b")).result(TIMEOUT_S)
    client.wait_for_end("b")
    client.thread.stop(TIMEOUT_S)


def test_the_inbox_is_bounded(model: Path) -> None:
    client = _Client(model, max_pending_calls=2)
    futures = [client.thread.call(_add(str(i))) for i in range(3)]
    with pytest.raises(Refused):
        futures[2].result(0)
    client.thread.start()
    for future in futures[:2]:
        assert future.result(TIMEOUT_S) is None
    client.thread.stop(TIMEOUT_S)


def test_a_cancelled_call_is_not_run(model: Path) -> None:
    client = _Client(model)
    future = client.thread.call(_add("a"))
    assert future.cancel()
    client.thread.start()
    state = client.thread.call(lambda engine: engine.stats().num_waiting).result(TIMEOUT_S)
    assert state == 0
    client.thread.stop(TIMEOUT_S)


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    client = _Client(tmp_path)
    pending = client.thread.call(_add("a"))
    with pytest.raises(UnsupportedModel):
        client.thread.start().result(TIMEOUT_S)
    with pytest.raises(EngineError, match="has stopped"):
        pending.result(TIMEOUT_S)
    assert client.thread.stop(TIMEOUT_S)
    assert not client.fatal.done()


def test_after_stop_calls_fail_and_the_thread_is_gone(model: Path) -> None:
    client = _Client(model)
    client.thread.start().result(TIMEOUT_S)
    client.thread.call(_add("a", 200)).result(TIMEOUT_S)
    assert client.thread.stop(TIMEOUT_S)
    assert not client.thread.is_alive
    with pytest.raises(EngineError, match="stopped"):
        client.thread.call(_add("b")).result(0)
    assert client.thread.stop(TIMEOUT_S)


def test_stopping_from_inside_is_refused_not_a_deadlock(model: Path) -> None:
    client = _Client(model)
    client.thread.start()
    with pytest.raises(LifecycleError):
        client.thread.call(lambda _: client.thread.stop(TIMEOUT_S)).result(TIMEOUT_S)
    assert client.thread.stop(TIMEOUT_S)


def test_an_error_of_the_receiver_is_fatal_and_said(model: Path) -> None:
    fatal: Future[BaseException] = Future()

    def broken(step: StepOutput) -> None:
        raise RuntimeError("no taker")

    def factory(progress: Progress) -> Engine:
        return make_engine(model)

    thread = EngineThread(factory, on_output=broken, on_fatal=fatal.set_result)
    thread.start().result(TIMEOUT_S)
    thread.call(_add("a")).result(TIMEOUT_S)
    assert str(fatal.result(TIMEOUT_S)) == "no taker"
    with pytest.raises(EngineError, match="stopped"):
        thread.call(_add("b")).result(TIMEOUT_S)
    assert thread.stop(TIMEOUT_S)
