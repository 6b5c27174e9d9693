"""The leader's regular comparison of what it believes with what workers hold.

Hints on the bus can be lost. Twice in a row out of step with a worker's own account, an attempt
that nobody asked for is aborted there, and one that is nowhere is lost.
"""

import asyncio
import logging
from collections.abc import Callable

from services.scheduler.cluster import SERVING_ROLES, Cluster
from services.scheduler.commands import WorkerCommands
from services.scheduler.table import Entry, EntryStatus, RequestTable
from shared.core.request import RequestKey
from shared.errors import BusError, ProtocolError
from shared.messages.workers import RequestStage, WorkerSnapshot

log = logging.getLogger(__name__)

_ALIVE = (RequestStage.PREFILL, RequestStage.SENDING, RequestStage.DECODE)
"""A mere reservation is not alive: nobody may be about to fill it."""

MISSES = 2
"""How many audits in a row must agree before anything is done."""


class Audit:
    """Compares the table with what workers and gateways say they have.

    ``lose(entry, reason)`` ends an attempt, ``forget(entry, reason)`` a request that nobody owns;
    ``on_done()`` is called after each audit.
    """

    def __init__(
        self,
        commands: WorkerCommands,
        cluster: Cluster,
        table: RequestTable,
        *,
        lose: Callable[[Entry, str], None],
        forget: Callable[[Entry, str], None],
        on_done: Callable[[], None],
    ) -> None:
        self._commands = commands
        self._cluster = cluster
        self._table = table
        self._lose = lose
        self._forget = forget
        self._on_done = on_done
        self._strangers: dict[tuple[str, RequestKey], int] = {}

    async def run(self, period_s: float) -> None:
        """Audit every ``period_s``. Runs until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            await self.once()

    async def once(self) -> None:
        """One audit of all live workers."""
        instances = [n for role in SERVING_ROLES for n in self._cluster.instances_of(role)]
        snapshots = await asyncio.gather(*(self._snapshot(name) for name in instances))
        answered = {s.instance: s for s in snapshots if s is not None}
        self._abort_strangers(answered)
        self._lose_missing(answered)
        await self._forget_unowned()
        self._on_done()

    def _repair(
        self,
        entry: Entry,
        asked: list[str],
        stages: dict[tuple[str, RequestKey], RequestStage],
    ) -> None:
        """Learn from the snapshots what lost hints would have said."""
        at_prefill = stages.get((entry.prefill, entry.key))
        if entry.prefill in asked and at_prefill is not RequestStage.PREFILL:
            self._table.leave_batch(entry)
        if stages.get((entry.decode, entry.key)) in (RequestStage.DECODE, RequestStage.ENDED):
            entry.has_handed_over = True

    async def _forget_unowned(self) -> None:
        """Remove requests that their own gateway does not have (any more)."""
        owned: dict[str, set[str]] = {}
        for gateway in {entry.gateway for entry in self._table}:
            try:
                snapshot = await self._commands.gateway_snapshot(gateway)
            except (BusError, ProtocolError) as error:
                log.info("no snapshot of %s: %s", gateway, error)
                if self._cluster.is_alive(gateway):
                    continue
                owned[gateway] = set()
            else:
                owned[gateway] = {key.request_id for key in snapshot.requests}
        for entry in self._table:
            if entry.gateway not in owned:
                continue
            is_owned = entry.request.request_id in owned[entry.gateway]
            entry.unowned_audits = 0 if is_owned else entry.unowned_audits + 1
            if entry.unowned_audits >= MISSES:
                self._forget(entry, "its gateway does not know it")

    async def reconcile(self, instance: str) -> None:
        """An instance (re)joined: abort at once whatever it runs that is not wanted there."""
        snapshot = await self._snapshot(instance)
        if snapshot is not None:
            unwanted = [key for key in self._held(snapshot) if not self._is_wanted(instance, key)]
            self._commands.abort([instance], unwanted, reason="not wanted there any more")

    async def _snapshot(self, instance: str) -> WorkerSnapshot | None:
        try:
            return await self._commands.snapshot(instance)
        except (BusError, ProtocolError) as error:
            log.info("no snapshot of %s: %s", instance, error)
            return None

    @staticmethod
    def _held(snapshot: WorkerSnapshot) -> list[RequestKey]:
        return [
            RequestKey(held.request_id, held.attempt)
            for held in snapshot.requests
            if held.stage is not RequestStage.ENDED
        ]

    def _is_wanted(self, instance: str, key: RequestKey) -> bool:
        entry = self._table.current(key)
        return entry is not None and instance in entry.instances

    def _abort_strangers(self, answered: dict[str, WorkerSnapshot]) -> None:
        strangers: dict[tuple[str, RequestKey], int] = {}
        for instance, snapshot in answered.items():
            for key in self._held(snapshot):
                if not self._is_wanted(instance, key):
                    strangers[instance, key] = self._strangers.get((instance, key), 0) + 1
        for (instance, key), times in strangers.items():
            if times >= MISSES:
                self._commands.abort([instance], [key], reason="nobody asked for it")
        self._strangers = strangers

    def _lose_missing(self, answered: dict[str, WorkerSnapshot]) -> None:
        stages = {
            (instance, RequestKey(held.request_id, held.attempt)): held.stage
            for instance, snapshot in answered.items()
            for held in snapshot.requests
        }
        for entry in self._table:
            if entry.status is not EntryStatus.PLACED:
                continue
            asked = [name for name in entry.instances if name in answered]
            self._repair(entry, asked, stages)
            alive = [stages.get((name, entry.key)) in _ALIVE for name in asked]
            # An end that its gateway has not heard of yet is repeated by the decode instance.
            has_ended = stages.get((entry.decode, entry.key)) is RequestStage.ENDED
            if len(asked) < len(entry.instances) or any(alive) or has_ended:
                entry.missed_audits = 0
                continue
            entry.missed_audits += 1
            if entry.missed_audits >= MISSES:
                self._lose(entry, "no instance has it any more")
