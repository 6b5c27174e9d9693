"""One leader's term: from taking the lease until losing it.

A term starts with empty tables. It fills them with what gateways re-send and instances hold, and
only then dispatches; running requests are found, not restarted.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

from services.scheduler.audit import Audit
from services.scheduler.cluster import Cluster
from services.scheduler.commands import WorkerCommands
from services.scheduler.config import SchedulerSettings
from services.scheduler.counters import SchedulerCounters
from services.scheduler.dispatcher import Dispatcher, DispatchHooks
from services.scheduler.predictions import Predictions
from services.scheduler.recovery import Findings
from services.scheduler.routing import RoutingLimits
from services.scheduler.table import Entry, EntryStatus, RequestTable
from shared.bus.base import Bus, Subscription
from shared.bus.leader import LeaderElection
from shared.clock import Clock
from shared.core.policies import create_policy
from shared.errors import BusError, NoResponder, ProtocolError, StaleCommand, UnknownMessage
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.requests import (
    AttemptLost,
    AttemptPlaced,
    CloseRequest,
    Done,
    LeaderChanged,
    SubmitReply,
    SubmitRequest,
    SubmitStatus,
)
from shared.messages.workers import (
    AttemptEnded,
    PrefillFinished,
    TransferFinished,
    WorkerSnapshot,
)

log = logging.getLogger(__name__)

CLOSED_REMEMBERED = 10_000
"""Closed requests that are remembered, so that a late submission does not revive them."""


class Term:
    """Serves ``requests.<model>`` while this scheduler leads."""

    def __init__(
        self,
        *,
        epoch: int,
        election: LeaderElection,
        bus: Bus,
        cluster: Cluster,
        settings: SchedulerSettings,
        clock: Clock,
        counters: SchedulerCounters,
        listening_since_s: float,
    ) -> None:
        self.epoch = epoch
        self._listening_since_s = listening_since_s
        self._election = election
        self._bus = bus
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        self._counters = counters
        self._findings = Findings()
        self._recovered = asyncio.Event()
        self._is_over = False
        self._background: set[asyncio.Task[None]] = set()
        self.table = RequestTable()
        self.commands = WorkerCommands(
            bus,
            cluster,
            epoch=lambda: self.epoch if self._election.is_leader else None,
            timeout_s=settings.command_timeout_s,
            reservation_ttl_s=settings.reservation_ttl_s,
        )
        self.dispatcher = Dispatcher(
            commands=self.commands,
            cluster=cluster,
            table=self.table,
            policy=create_policy(settings.policy),
            limits=RoutingLimits(
                max_batches=settings.max_batches,
                max_batched_tokens=settings.max_batched_tokens,
                max_requests=settings.max_batch_requests,
            ),
            clock=clock,
            hooks=DispatchHooks(
                on_placed=self._on_placed,
                on_lost=self.lose,
                on_unreachable=self._on_unreachable,
            ),
            retry_s=settings.retry_s,
            patience_s=settings.patience_s,
            avoid_s=settings.avoid_s,
        )
        self._predictions = Predictions(bus, settings, clock, counters, self.dispatcher)
        self._audit = Audit(
            self.commands,
            cluster,
            self.table,
            lose=self.lose,
            forget=self._forget,
            on_done=self.dispatcher.wake,
        )
        self._closed: OrderedDict[str, None] = OrderedDict()

    async def run(self) -> None:
        """Announce the term, recover, dispatch. Ends by cancellation, freeing its subjects."""
        subscription = await self._open_intake()
        try:
            await self._recover()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.dispatcher.run(), name="dispatcher")
                tasks.create_task(self._predictions.run(), name="predictions")
                tasks.create_task(self._audit.run(self._settings.audit_period_s), name="audit")
        finally:
            self._is_over = True
            self._recovered.set()  # whoever waits for it is told that the term is over
            for task in self._background:
                task.cancel()
            await subscription.unsubscribe()
            await self.commands.close()

    async def _open_intake(self) -> Subscription:
        """Serve requests and say so; while the bus is away, again and again."""
        subscription: Subscription | None = None
        announcement = LeaderChanged(
            scheduler=self._settings.instance,
            model=self._settings.served_model_name,
            leader_epoch=self.epoch,
        )
        while True:
            try:
                if subscription is None:
                    subject = subjects.requests(self._settings.served_model_name)
                    subscription = await self._bus.serve(subject, self._serve)
                await self._bus.publish(subjects.leader_events(), announcement)
                return subscription
            except BusError as error:
                log.warning("the term cannot be announced yet: %s", error)
                await asyncio.sleep(self._settings.retry_s)

    async def _recover(self) -> None:
        """Ask every live worker what it holds: until all have answered, or for a second.

        A standby has heard for long who is alive; a scheduler that has just started listens first.
        """
        heard_s = self._clock.now_s() - self._listening_since_s
        await asyncio.sleep(max(0.0, self._settings.listen_s - heard_s))
        workers = [
            name for role in ("prefill", "decode") for name in self._cluster.instances_of(role)
        ]

        async def ask(instance: str) -> None:
            try:
                async with asyncio.timeout(self._settings.takeover_s):
                    self._findings.add(await self._patient_snapshot(instance))
            except (BusError, ProtocolError, TimeoutError) as error:
                log.warning("%s did not say what it holds: %s", instance, error)
                self._findings.silent.add(instance)

        await asyncio.gather(*(ask(instance) for instance in workers))
        log.info(
            "epoch %d leads; %d attempts found at %d of %d workers",
            self.epoch,
            len(self._findings.attempts),
            len(workers) - len(self._findings.silent),
            len(workers),
        )
        self._recovered.set()
        self.dispatcher.wake()

    async def _patient_snapshot(self, instance: str) -> WorkerSnapshot:
        """A snapshot of a worker that may be about to reconnect."""
        while True:
            try:
                return await self.commands.snapshot(instance)
            except NoResponder:
                await asyncio.sleep(self._settings.retry_s)

    # Requests from gateways

    async def _serve(self, message: Message) -> Message:
        self._check_lead()
        match message:
            case SubmitRequest():
                return await self._on_submit(message)
            case CloseRequest():
                return self._on_close(message)
            case _:
                raise UnknownMessage(f"{type(message).__name__} is not for the scheduler")

    def _check_lead(self) -> None:
        if self._is_over or not self._election.is_leader:
            raise StaleCommand("this scheduler does not lead any more")

    async def _on_submit(self, message: SubmitRequest) -> SubmitReply:
        request = message.request
        arrival_s = self._clock.now_s() - message.age_s
        await self._recovered.wait()
        self._check_lead()
        entry = self.table.get(request.request_id)
        if entry is not None and entry.request.attempt >= request.attempt:
            return self._status_of(entry, request.attempt)
        if request.request_id in self._closed:  # its closing has overtaken it
            return self._reply(
                request.request_id, request.attempt, SubmitStatus.LOST, reason="closed already"
            )
        if entry is not None:
            self._withdraw(entry, f"attempt {request.attempt} follows")
            arrival_s = min(arrival_s, entry.arrival_s)
        return self._admit(message, arrival_s)

    def _admit(self, message: SubmitRequest, arrival_s: float) -> SubmitReply:
        request = message.request
        entry = Entry(request=request, gateway=message.gateway, arrival_s=arrival_s)
        found = self._findings.take_running(request.key)
        if found is not None and all(map(self._cluster.is_alive, (found.prefill, found.decode))):
            self.table.put(entry)
            self.table.assign(entry, prefill=found.prefill, decode=found.decode)
            entry.status = EntryStatus.PLACED
            entry.has_handed_over = found.has_handed_over
            if not found.has_handed_over:
                self.table.enter_batch(self.commands.next_batch_id(), found.prefill, [entry])
            return self._status_of(entry, request.attempt)
        if message.is_resend:
            # Somebody who did not answer may be running it: only the next attempt is safe.
            self.table.put(entry)
            self.table.mark_lost(entry, "it was not found after a change of leaders")
            return self._status_of(entry, request.attempt)
        is_new = request.attempt == 0
        if is_new and self.dispatcher.policy.num_waiting >= self._settings.max_queued_requests:
            self._counters.refused.inc()
            return self._reply(
                request.request_id,
                request.attempt,
                SubmitStatus.REFUSED,
                reason=f"{self._settings.max_queued_requests} requests wait already",
                retry_after_s=self._settings.retry_after_s,
            )
        reserved_at = self._findings.take_reservation(request.key)
        if reserved_at:
            self.commands.abort([reserved_at], [request.key], reason="reserved by an older leader")
        self.table.put(entry)
        self.dispatcher.enqueue(entry)
        self._predictions.ask(request)
        self._counters.accepted.inc()
        return self._status_of(entry, request.attempt)

    def _status_of(self, entry: Entry, attempt: int) -> SubmitReply:
        request_id = entry.request.request_id
        if entry.status is EntryStatus.LOST or entry.request.attempt != attempt:
            return self._reply(request_id, attempt, SubmitStatus.LOST, reason=entry.lost_reason)
        if entry.status is EntryStatus.PLACED:
            return self._reply(request_id, attempt, SubmitStatus.PLACED, instances=entry.instances)
        return self._reply(request_id, attempt, SubmitStatus.QUEUED)

    def _reply(
        self,
        request_id: str,
        attempt: int,
        status: SubmitStatus,
        *,
        reason: str = "",
        retry_after_s: float = 0.0,
        instances: tuple[str, ...] = (),
    ) -> SubmitReply:
        return SubmitReply(
            request_id=request_id,
            attempt=attempt,
            leader_epoch=self.epoch,
            status=status,
            reason=reason,
            retry_after_s=retry_after_s,
            instances=instances,
        )

    def _on_close(self, message: CloseRequest) -> Done:
        self._closed[message.request_id] = None
        if len(self._closed) > CLOSED_REMEMBERED:
            self._closed.popitem(last=False)
        entry = self.table.get(message.request_id)
        if entry is None:
            return Done(count=0)
        self._forget(entry, message.outcome)
        return Done(count=1)

    def _forget(self, entry: Entry, reason: str) -> None:
        """The request is over: nothing of it stays here or at the workers."""
        self._withdraw(entry, reason)
        self.table.remove(entry.request.request_id)
        self.dispatcher.wake()

    def _withdraw(self, entry: Entry, reason: str) -> None:
        """Free whatever this attempt holds anywhere."""
        self.dispatcher.policy.on_finish(entry.key, self._clock.now_s())
        self.commands.abort(entry.instances, [entry.key], reason=reason)
        self.table.leave_batch(entry)
        self.table.unassign(entry)

    # What happens at the workers

    def on_event(self, message: Message) -> None:
        """A worker's hint about one attempt; hints about older attempts are dropped."""
        match message:
            case PrefillFinished():
                self._counters.prefilled.inc()
            case TransferFinished() | AttemptEnded():
                pass
            case _:
                return
        entry = self.table.get(message.request_id)
        if entry is None or entry.request.attempt != message.attempt:
            self._counters.stale.inc()
            return
        if isinstance(message, TransferFinished):
            entry.has_handed_over = True
        if isinstance(message, AttemptEnded) and message.error:
            self.lose(entry, message.error)
        elif isinstance(message, AttemptEnded) and message.instance == entry.decode:
            self.dispatcher.policy.on_finish(entry.key, self._clock.now_s())
        if self.table.leave_batch(entry) or isinstance(message, AttemptEnded):
            self.dispatcher.wake()

    def on_report(self, instance: str, *, joined: bool) -> None:
        """A worker reported. One that joins may bring attempts that were given up meanwhile."""
        if joined and self._recovered.is_set():
            self._keep(self._audit.reconcile(instance))
        if self.dispatcher.policy.num_waiting:
            self.dispatcher.wake()

    def on_instance_gone(self, role: str, instance: str, reason: str) -> None:
        """An instance died: lose its attempts, or, for a gateway, end its requests everywhere."""
        if role == "gateway":
            for entry in self.table.of_gateway(instance):
                self._forget(entry, "its gateway is gone")
        else:
            for entry in self.table.of_instance(instance):
                self.lose(entry, f"{instance} {reason}")
        self.dispatcher.wake()

    def lose(self, entry: Entry, reason: str) -> None:
        """This attempt will not end: free the rest of it and tell its gateway."""
        if self.table.current(entry.key) is not entry or entry.status is EntryStatus.LOST:
            return
        self._counters.lost.inc()
        self._withdraw(entry, reason)
        self.table.mark_lost(entry, reason)
        self._hint(
            entry,
            AttemptLost(
                request_id=entry.request.request_id,
                attempt=entry.request.attempt,
                leader_epoch=self.epoch,
                reason=reason,
            ),
        )

    def _on_placed(self, entry: Entry) -> None:
        self._counters.placed.inc()
        self._predictions.on_dispatched(entry.key)
        self._hint(
            entry,
            AttemptPlaced(
                request_id=entry.request.request_id,
                attempt=entry.request.attempt,
                leader_epoch=self.epoch,
                instances=entry.instances,
            ),
        )

    def _on_unreachable(self, instance: str) -> None:
        """Nobody serves its subjects: dead, unless the bus has only just come back."""
        if self._clock.now_s() < self._cluster.membership.judges_from_s:
            return
        role = self._cluster.remove(instance)
        if role is not None:
            log.warning("%s is gone: nobody serves its subjects", instance)
            self.on_instance_gone(role, instance, "is gone")

    def _hint(self, entry: Entry, message: Message) -> None:
        self._keep(self._publish_hint(entry.gateway, message))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beside everything else, for as long as this term lasts."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _publish_hint(self, gateway: str, message: Message) -> None:
        try:
            await self._bus.publish(subjects.gateway_events(gateway), message)
        except BusError as error:
            log.info("hint to %s not sent, it will ask: %s", gateway, error)
