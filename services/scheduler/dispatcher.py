"""Turns waiting requests into batches at workers: policy, routing, reservation, start."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from services.scheduler.cluster import Cluster
from services.scheduler.commands import WorkerCommands
from services.scheduler.routing import (
    Pools,
    RoutingLimits,
    beside_siblings,
    capacity_of,
    choose_decode,
    divide,
)
from services.scheduler.table import Entry, EntryStatus, RequestTable
from shared.clock import Clock
from shared.core.policies import Policy, QueuedRequest
from shared.errors import BusError, NoResponder, ProtocolError, RemoteError
from shared.messages.workers import StartItem

log = logging.getLogger(__name__)

PASSING_REFUSALS = ("Overloaded", "Refused", "StaleCommand")
"""Refusals that a later try may not meet; any other would be met again and again."""

APART_ATTEMPTS = 3
"""From this attempt on a request stays on one instance: where the data plane between two of them is
broken, answers are slower but they come."""

Reserving = asyncio.Task[StartItem | None]
"""A reservation under way; its result is ``None`` when the request is not started now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchHooks:
    """What the dispatcher tells its owner.

    ``on_placed(entry)``: both instances have the attempt. ``on_lost(entry, reason)``: it may or may
    not have been started, so only the next attempt is safe. ``on_unreachable(instance)``: nobody
    serves that instance's subjects any more.
    """

    on_placed: Callable[[Entry], None]
    on_lost: Callable[[Entry, str], None]
    on_unreachable: Callable[[str], None]


class Dispatcher:
    """Owns the waiting requests of the leader. Woken by events, never by polling."""

    def __init__(
        self,
        *,
        commands: WorkerCommands,
        cluster: Cluster,
        table: RequestTable,
        policy: Policy,
        limits: RoutingLimits,
        clock: Clock,
        hooks: DispatchHooks,
        retry_s: float,
        patience_s: float,
        avoid_s: float,
    ) -> None:
        self._commands = commands
        self._cluster = cluster
        self._table = table
        self._policy = policy
        self._limits = limits
        self._clock = clock
        self._hooks = hooks
        self._retry_s = retry_s
        self._patience_s = patience_s
        self._avoid_s = avoid_s
        self._avoided: dict[str, float] = {}
        """Until when: decode instances that owe an answer or failed to give one."""
        self._wake = asyncio.Event()
        self._placements: set[asyncio.Task[None]] = set()

    @property
    def policy(self) -> Policy:
        """The policy that orders the waiting requests."""
        return self._policy

    def wake(self) -> None:
        """Something changed: look whether a batch can start."""
        self._wake.set()

    def enqueue(self, entry: Entry) -> None:
        """An attempt waits from now on (or again, at its old place)."""
        self._table.unassign(entry)
        entry.status = EntryStatus.WAITING
        now_s = self._clock.now_s()
        self._policy.on_arrival(
            QueuedRequest(request=entry.request, arrival_s=entry.arrival_s), now_s
        )
        self.wake()

    async def run(self) -> None:
        """Start batches whenever there is something to start. Runs until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._dispatch()
        finally:
            for task in self._placements:
                task.cancel()

    def _dispatch(self) -> None:
        if not self._policy.num_waiting:
            return
        pools = divide(
            self._cluster.workers(
                num_assigned=self._table.num_assigned(), num_batches=self._table.num_batches()
            )
        )
        capacity = capacity_of(pools, self._limits)
        batches = self._policy.next_prefill_batches(self._clock.now_s(), capacity)
        if pools.is_disaggregated:  # else their decodes would gather in one place too
            batches = beside_siblings(batches, pools, capacity, self._table.homes_of_groups())
        for batch in batches:
            entries = [self._table.current(queued.key) for queued in batch.requests]
            live = [entry for entry in entries if entry is not None]
            self._choose(batch.instance, live, pools)

    def _choose(self, prefill: str, entries: list[Entry], pools: Pools) -> None:
        """Route a batch on what is known now, and place it in the background."""
        placed = []
        for entry in entries:
            is_apart = pools.is_disaggregated and entry.request.attempt < APART_ATTEMPTS
            decode = self._route(entry, pools) if is_apart else prefill
            if decode is None:
                self._retry_later(entry)
                continue
            entry.status = EntryStatus.PLACING
            self._table.assign(entry, prefill=prefill, decode=decode)
            self._cluster.on_assigned(decode, self._num_blocks(entry, pools))
            placed.append(entry)
        if placed:
            batch_id = self._commands.next_batch_id()
            self._table.enter_batch(batch_id, prefill, placed)
            task = asyncio.create_task(self._place(batch_id, prefill, placed, pools))
            self._placements.add(task)
            task.add_done_callback(lambda done: self._on_placement_done(done, placed))

    def _on_placement_done(self, done: asyncio.Task[None], entries: list[Entry]) -> None:
        self._placements.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            # A bug; still nobody may be left between waiting and placed.
            log.error("placing a batch failed unexpectedly", exc_info=error)
            for entry in entries:
                if entry.status is EntryStatus.PLACING:
                    self._hooks.on_lost(entry, "placing it failed")

    def _route(self, entry: Entry, pools: Pools) -> str | None:
        # Pools were drawn before this batch: count what it has itself taken from each worker.
        fresh = divide(
            self._cluster.workers(
                num_assigned=self._table.num_assigned(), num_batches=self._table.num_batches()
            )
        )
        worker = choose_decode(
            fresh,
            num_blocks=self._num_blocks(entry, pools),
            kv_layout=pools.prefill[0].report.kv_layout,
            avoided=self._avoided_now(),
        )
        return worker.instance if worker is not None else None

    def _avoided_now(self) -> Collection[str]:
        now_s = self._clock.now_s()
        self._avoided = {
            name: until_s for name, until_s in self._avoided.items() if until_s > now_s
        }
        return self._avoided

    @staticmethod
    def _num_blocks(entry: Entry, pools: Pools) -> int:
        report = pools.decode[0].report
        # An engine lets a request have its whole pool, but no block more.
        return min(-(-entry.request.num_tokens // report.block_size) + 1, report.num_blocks)

    def _retry_later(self, entry: Entry) -> None:
        asyncio.get_running_loop().call_later(self._retry_s, self._requeue, entry)

    def _requeue(self, entry: Entry) -> None:
        """Back to the queue, if the attempt is still wanted."""
        if self._table.current(entry.key) is entry and entry.status is not EntryStatus.LOST:
            self._table.leave_batch(entry)
            self.enqueue(entry)

    async def _place(self, batch_id: int, prefill: str, entries: list[Entry], pools: Pools) -> None:
        """Reserve for each of a batch and start it.

        Nobody waits longer than ``patience_s`` for somebody else's answer. Those that are left
        behind hold no slot, and start when theirs comes or, if none does, are queued again.
        """
        # Entries may be withdrawn before their turn comes: where they were to go is noted now.
        targets = [entry.decode for entry in entries]
        reserving = {
            asyncio.create_task(self._reserve(entry, prefill, decode, pools)): entry
            for entry, decode in zip(entries, targets, strict=True)
        }
        waiting, have_left = set(reserving), False
        try:
            while waiting:
                answered, waiting = await asyncio.wait(
                    waiting,
                    timeout=None if have_left else self._patience_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if answered and waiting:
                    more, waiting = await asyncio.wait(waiting, timeout=self._patience_s)
                    answered |= more
                items = self._items(reserving, answered)
                if items and have_left:
                    batch_id = self._commands.next_batch_id()
                    self._table.enter_batch(batch_id, prefill, [entry for entry, _ in items])
                for task, decode in zip(reserving, targets, strict=True):
                    if task in waiting:
                        self._avoid(decode)
                        self._table.leave_batch(reserving[task])
                have_left = True
                await self._start(batch_id, prefill, items)
        finally:
            for task in reserving:
                task.cancel()

    def _avoid(self, decode: str) -> None:
        self._avoided[decode] = self._clock.now_s() + self._avoid_s

    def _items(
        self, reserving: Mapping[Reserving, Entry], answered: set[Reserving]
    ) -> list[tuple[Entry, StartItem]]:
        """What can be started of ``answered``, in the order of the batch."""
        results = [(entry, task.result()) for task, entry in reserving.items() if task in answered]
        return [(e, item) for e, item in results if item is not None and self._is_placing(e)]

    async def _start(
        self, batch_id: int, prefill: str, items: list[tuple[Entry, StartItem]]
    ) -> None:
        """Have ``prefill`` start ``items``."""
        if not items:
            self.wake()
            return
        entries = [entry for entry, _ in items]
        try:
            await self._commands.start(prefill, batch_id, tuple(item for _, item in items))
        except (NoResponder, RemoteError) as error:
            log.warning("%s did not start batch %d: %s", prefill, batch_id, error)
            self._give_back(entries, f"{prefill} did not start it")
            if isinstance(error, NoResponder):
                self._hooks.on_unreachable(prefill)
        except (BusError, ProtocolError) as error:
            log.warning("batch %d may or may not run at %s: %s", batch_id, prefill, error)
            for entry in entries:
                self._hooks.on_lost(entry, f"{prefill} did not answer")
        else:
            for entry in entries:
                if self._is_placing(entry):
                    entry.status = EntryStatus.PLACED
                    self._hooks.on_placed(entry)

    def _is_placing(self, entry: Entry) -> bool:
        is_current = self._table.current(entry.key) is entry
        return is_current and entry.status is EntryStatus.PLACING

    async def _reserve(
        self, entry: Entry, prefill: str, decode: str, pools: Pools
    ) -> StartItem | None:
        """Reserve at the decode instance; ``None`` when the request is not started now."""
        if not self._is_placing(entry):
            return None
        if decode == prefill:
            return StartItem(gateway=entry.gateway, request=entry.request)
        try:
            target = await self._commands.reserve(
                decode,
                entry.request,
                gateway=entry.gateway,
                kv_layout=pools.prefill[0].report.kv_layout,
            )
        except RemoteError as error:
            self._avoided.pop(decode, None)
            if error.code == "OutOfBlocks":
                self._cluster.on_blocks_refused(decode)
            elif error.code not in PASSING_REFUSALS:
                self._hooks.on_lost(entry, f"{decode}: {error}")
                return None
            self._leave(entry)
            return None
        except (BusError, ProtocolError) as error:
            log.warning("no reservation at %s: %s", decode, error)
            self._avoid(decode)
            self._give_back([entry], f"{decode} did not answer")
            if isinstance(error, NoResponder):
                self._hooks.on_unreachable(decode)
            return None
        self._avoided.pop(decode, None)
        return StartItem(gateway=entry.gateway, request=entry.request, target=target)

    def _leave(self, entry: Entry) -> None:
        self._table.leave_batch(entry)
        if entry.status is EntryStatus.PLACING:
            self._retry_later(entry)

    def _give_back(self, entries: list[Entry], reason: str) -> None:
        """Nothing was started: free the reservations and let the requests wait again."""
        for entry in entries:
            self._commands.abort(set(entry.instances), [entry.key], reason=reason)
            self._leave(entry)
