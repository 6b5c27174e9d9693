"""The thread that owns an engine: calls go in between iterations, outputs come out of it."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shared.engine.engine import Engine
from shared.engine.outputs import StepOutput
from shared.engine.spec import ModelSpec
from shared.errors import EngineError, LifecycleError, Refused
from shared.kvcache.layout import KVLayout

Progress = Callable[[str, float], None]
"""``(what, fraction)``: how far loading is, called in the engine's thread."""

T = TypeVar("T")
_Call = tuple[Callable[[Engine], Any], Future[Any]]

FULL_INBOX_RETRY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What does not change about a loaded engine."""

    spec: ModelSpec
    layout: KVLayout
    num_blocks: int
    max_model_len: int
    device: str


class EngineThread:
    """Runs one engine in one thread of its own; nobody else may touch the engine.

    ``factory`` makes the engine inside the thread, so that loading blocks nobody. ``on_output``
    gets every step's result and ``on_fatal`` the error that ended the thread; both are called in
    the thread and must not block. An error of ``on_output`` is fatal too. After a fatal error all
    calls fail. The thread sleeps on its inbox while the engine has nothing to compute.
    """

    def __init__(
        self,
        factory: Callable[[Progress], Engine],
        *,
        on_output: Callable[[StepOutput], None],
        on_fatal: Callable[[BaseException], None],
        on_progress: Progress | None = None,
        num_threads: int | None = None,
        max_pending_calls: int = 4096,
        name: str = "engine",
    ) -> None:
        self._factory = factory
        self._on_output = on_output
        self._on_fatal = on_fatal
        self._on_progress = on_progress
        self._num_threads = num_threads
        self._max_pending_calls = max_pending_calls
        self._inbox: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._ready: Future[EngineInfo] = Future()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def ready(self) -> Future[EngineInfo]:
        """Done when the model is loaded; has the error if it could not be."""
        return self._ready

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def start(self) -> Future[EngineInfo]:
        """Start the thread, which begins to load; returns ``ready``. Once only."""
        self._thread.start()
        return self._ready

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run ``function`` in the thread before the next iteration, in the order of the calls.

        Never blocks. The future gets its result or exception; ``Refused`` if ``max_pending_calls``
        wait already, ``EngineError`` if the engine has stopped or stops before the call's turn.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_stopping:
                future.set_exception(EngineError("the engine has stopped"))
            elif len(self._inbox) >= self._max_pending_calls:
                refusal = f"{self._max_pending_calls} calls to the engine are pending"
                future.set_exception(Refused(refusal, retry_after_s=FULL_INBOX_RETRY_S))
            else:
                self._inbox.append((function, future))
                self._changed.notify()
        return future

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the iteration it is in; pending calls fail.

        Blocks up to ``timeout_s`` and says whether the thread has ended. May be called again.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if threading.current_thread() is self._thread:
            raise LifecycleError("the engine's thread cannot wait for its own end")
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            # Both are properties of a thread in torch, so they are set in the one that computes.
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            engine = self._factory(self._report_progress)
        except BaseException as exc:
            self._close(exc)
            self._ready.set_exception(exc)
            return
        self._ready.set_result(
            EngineInfo(
                spec=engine.spec,
                layout=engine.layout,
                num_blocks=engine.num_blocks,
                max_model_len=engine.max_model_len,
                device=str(engine.device),
            )
        )
        try:
            self._run(engine)
        except BaseException as exc:
            self._close(exc)
            self._on_fatal(exc)
        else:
            self._close(EngineError("the engine has stopped"))

    def _run(self, engine: Engine) -> None:
        is_idle = False
        while self._take_calls(engine, may_block=is_idle):
            output = engine.step()
            is_idle = output is None
            if output is not None:
                self._on_output(output)

    def _take_calls(self, engine: Engine, *, may_block: bool) -> bool:
        """Run what is in the inbox, waiting for something if allowed; ``False`` to stop."""
        with self._changed:
            while may_block and not self._inbox and not self._is_stopping:
                self._changed.wait()
            if self._is_stopping:
                return False
            calls = deque(self._inbox)
            self._inbox.clear()
        while calls:
            function, future = calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(engine)
            except Exception as exc:
                future.set_exception(exc)
            except BaseException as exc:
                future.set_exception(exc)
                self._fail(calls, EngineError(f"the engine has stopped: {exc!r}"))
                raise
            else:
                future.set_result(result)
        return True

    def _close(self, cause: BaseException) -> None:
        with self._changed:
            self._is_stopping = True
            calls = list(self._inbox)
            self._inbox.clear()
        self._fail(calls, EngineError(f"the engine has stopped: {cause}"))

    @staticmethod
    def _fail(calls: Iterable[_Call], error: EngineError) -> None:
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _report_progress(self, what: str, fraction: float) -> None:
        if self._on_progress is not None:
            self._on_progress(what, fraction)
