"""Keeps every slot of the suite filled, and empties them in order. Decisions: ``supervision``."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cli.advice import LoggedError, Progress, advice_for, error_in
from cli.programs import Program, Run, StartError
from cli.supervision import GiveUp, Leave, Phase, Restart, RestartPolicy, Slot, Supervision
from shared.clock import Clock, MonotonicClock

log = logging.getLogger(__name__)

TAIL_LINES = 25
KILLED_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something happened to a slot; ``detail`` says what, for people."""

    slot: Slot
    phase: Phase
    instance: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The suite cannot work because of ``slot``.

    ``log_tail`` is empty where ``reason`` says it all; ``advice`` is what may help, if that is
    known.
    """

    slot: Slot
    reason: str
    log_tail: str
    advice: str | None = None


class Supervisor:
    """Owns the processes of the suite, each in the care of a task of its own.

    ``on_change`` is told of every change; ``on_death`` (slot, instance, exit code) of every process
    that ended though this supervisor had not asked it to, before another is started in its place.
    Everything runs on one event loop, in the main thread.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        on_change: Callable[[Change], None],
        on_death: Callable[[Slot, str, int], Awaitable[None]],
        policy: RestartPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._programs = {program.slot: program for program in programs}
        self._supervision = Supervision([program.slot for program in programs], policy)
        self._on_change = on_change
        self._on_death = on_death
        self._clock = clock or MonotonicClock()
        self._runs: dict[Slot, Run] = {}
        self._tasks: dict[Slot, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._failed: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a process that takes work."""
        return self._supervision.is_ready

    def phases(self) -> dict[Slot, Phase]:
        """How every slot is."""
        return self._supervision.phases()

    def pids(self) -> dict[str, int]:
        """The processes that run now, by instance."""
        return {run.instance: run.pid for run in self._runs.values()}

    def progress(self) -> dict[Slot, Progress]:
        """How far the processes are that still load something."""
        found = {
            slot: program.progress()
            for slot, program in self._programs.items()
            if self._supervision.is_starting(slot)
        }
        return {slot: progress for slot, progress in found.items() if progress is not None}

    def start(self) -> None:
        """Start a process in every slot."""
        for slot in self._programs:
            task = asyncio.create_task(self._keep(slot), name=f"keep {slot}")
            task.add_done_callback(functools.partial(self._reap, slot))
            self._tasks[slot] = task

    def became_ready(self, instance: str) -> bool:
        """``instance`` says that it takes work; returns whether that is news."""
        slot = self._supervision.became_ready(instance, self._clock.now_s())
        if slot is not None:
            self._on_change(Change(slot=slot, phase=Phase.READY, instance=instance))
        return slot is not None

    async def until_failed(self) -> Failure:
        """Return once a process cannot be made to run."""
        return await asyncio.shield(self._failed)

    async def stop(self, *, deadline_s: float, hurry: asyncio.Event) -> None:
        """Drain wave by wave, each for at most ``deadline_s``; from ``hurry`` on, kill at once."""
        waves = self._supervision.stop()
        self._stopping.set()
        for wave in waves:
            await self._end(wave, deadline_s, hurry)

    async def _end(self, wave: Iterable[Slot], deadline_s: float, hurry: asyncio.Event) -> None:
        tasks = {self._tasks[slot] for slot in wave if slot in self._tasks}
        if not tasks:
            return
        if not hurry.is_set():
            for run in self._runs_in(wave):
                run.terminate()
            ended = asyncio.ensure_future(asyncio.wait(tasks))
            hurrying = asyncio.ensure_future(hurry.wait())
            waiting: set[asyncio.Future[Any]] = {ended, hurrying}
            await asyncio.wait(waiting, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            for future in waiting:
                future.cancel()
        for run in self._runs_in(wave):
            log.warning("%s is killed", run.instance)
            run.kill()
        _, undead = await asyncio.wait(tasks, timeout=KILLED_DEADLINE_S)
        for task in undead:
            log.error("%s does not end", task.get_name())
            task.cancel()

    def _runs_in(self, wave: Iterable[Slot]) -> list[Run]:
        return [self._runs[slot] for slot in wave if slot in self._runs]

    async def _keep(self, slot: Slot) -> None:
        """Fill ``slot`` until the suite stops or it is to stay empty."""
        while not self._stopping.is_set():
            run = await self._start(slot)
            exit_code = 1 if run is None else await self._wait(slot, run)
            error = self._logged_error(slot) if run is not None and exit_code else None
            decision = self._supervision.exited(slot, exit_code, self._clock.now_s(), error)
            instance = "" if run is None else run.instance
            detail = decision.reason
            if isinstance(decision, Restart):
                detail += f", again in {decision.after_s:g} s"
            phase = self._supervision.phase(slot)
            log.info("%s is %s: %s", instance or slot, phase, detail)
            self._on_change(Change(slot=slot, phase=phase, instance=instance, detail=detail))
            match decision:
                case Restart():
                    await self._pause(decision.after_s)
                case GiveUp():
                    self._fail(slot, decision.reason, error, advice_for(error, exit_code))
                    return
                case Leave():
                    return

    def _logged_error(self, slot: Slot) -> LoggedError | None:
        return error_in(self._programs[slot].log_tail(TAIL_LINES))

    async def _start(self, slot: Slot) -> Run | None:
        program = self._programs[slot]
        try:
            run = await program.start()
        except StartError as error:
            log.error("%s cannot be started: %s", slot, error)
            return None
        self._runs[slot] = run
        self._supervision.started(slot, run.instance)
        self._on_change(Change(slot=slot, phase=Phase.STARTING, instance=run.instance))
        if program.is_ready_once_started:
            self.became_ready(run.instance)
        if self._stopping.is_set():  # it was being started while the others were told
            run.terminate()
        return run

    async def _wait(self, slot: Slot, run: Run) -> int:
        try:
            exit_code = await run.wait()
        finally:
            del self._runs[slot]
        if not self._stopping.is_set():
            await self._on_death(slot, run.instance, exit_code)
        return exit_code

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()

    def _reap(self, slot: Slot, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.critical("the task of %s died", slot, exc_info=error)
            self._fail(slot, repr(error))

    def _fail(
        self,
        slot: Slot,
        reason: str,
        error: LoggedError | None = None,
        advice: str | None = None,
    ) -> None:
        if not self._failed.done():
            log_tail = "" if error is not None else self._programs[slot].log_tail(TAIL_LINES)
            self._failed.set_result(
                Failure(slot=slot, reason=reason, log_tail=log_tail, advice=advice)
            )
