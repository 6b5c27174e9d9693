"""The leader's commands to workers: each with its epoch and its deadline."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable

from services.scheduler.cluster import Cluster
from shared.bus.base import Bus
from shared.core.request import Request, RequestKey
from shared.errors import BusError, LeaseLost, ProtocolError
from shared.messages import subjects
from shared.messages.requests import Done, GatewaySnapshot, SnapshotRequest
from shared.messages.workers import (
    AbortRequests,
    KVReserved,
    KVTarget,
    ReserveKV,
    StartBatch,
    StartItem,
    WorkerSnapshot,
)

log = logging.getLogger(__name__)


class WorkerCommands:
    """Sends commands to workers. ``epoch`` gives the leader's epoch, ``None`` when deposed.

    Every command raises a ``BusError`` when it was not carried out for certain; ``NoResponder`` and
    ``RemoteError`` mean that it certainly was not.
    """

    def __init__(
        self,
        bus: Bus,
        cluster: Cluster,
        *,
        epoch: Callable[[], int | None],
        timeout_s: float,
        reservation_ttl_s: float,
    ) -> None:
        self._bus = bus
        self._cluster = cluster
        self._epoch = epoch
        self._timeout_s = timeout_s
        self._reservation_ttl_s = reservation_ttl_s
        self._batch_ids = itertools.count(1)
        self._aborts: set[asyncio.Task[None]] = set()

    def next_batch_id(self) -> int:
        """A batch id not used before by this leader."""
        return next(self._batch_ids)

    def _subject(self, instance: str, verb: str) -> str:
        return subjects.worker(self._cluster.role_of(instance) or "decode", instance, verb)

    def _leader_epoch(self) -> int:
        epoch = self._epoch()
        if epoch is None:
            raise LeaseLost("this scheduler does not lead any more")
        return epoch

    async def reserve(
        self, instance: str, request: Request, *, gateway: str, kv_layout: str
    ) -> KVTarget:
        """Reserve blocks at ``instance`` for the KV of ``request``."""
        command = ReserveKV(
            leader_epoch=self._leader_epoch(),
            gateway=gateway,
            request=request,
            kv_layout=kv_layout,
            ttl_s=self._reservation_ttl_s,
        )
        subject = self._subject(instance, "reserve")
        reply = await self._bus.request(subject, command, KVReserved, timeout_s=self._timeout_s)
        return reply.target

    async def start(self, instance: str, batch_id: int, items: tuple[StartItem, ...]) -> None:
        """Start a batch at ``instance``."""
        command = StartBatch(leader_epoch=self._leader_epoch(), batch_id=batch_id, items=items)
        subject = self._subject(instance, "start")
        await self._bus.request(subject, command, Done, timeout_s=self._timeout_s)

    async def snapshot(self, instance: str) -> WorkerSnapshot:
        """What ``instance`` holds; from now on it refuses older epochs."""
        command = SnapshotRequest(leader_epoch=self._leader_epoch())
        return await self._bus.request(
            subjects.snapshot(instance), command, WorkerSnapshot, timeout_s=self._timeout_s
        )

    async def gateway_snapshot(self, gateway: str) -> GatewaySnapshot:
        """Which requests ``gateway`` has."""
        command = SnapshotRequest(leader_epoch=self._leader_epoch())
        return await self._bus.request(
            subjects.snapshot(gateway), command, GatewaySnapshot, timeout_s=self._timeout_s
        )

    def abort(self, instances: Iterable[str], keys: Iterable[RequestKey], *, reason: str) -> None:
        """Abort attempts at ``instances`` in the background; what stays undone an audit finds."""
        wanted = tuple(keys)
        if not wanted:
            return
        for instance in instances:
            if self._cluster.is_alive(instance):
                task = asyncio.create_task(self._abort(instance, wanted, reason))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)

    async def _abort(self, instance: str, keys: tuple[RequestKey, ...], reason: str) -> None:
        try:
            command = AbortRequests(leader_epoch=self._leader_epoch(), requests=keys, reason=reason)
            subject = self._subject(instance, "abort")
            await self._bus.request(subject, command, Done, timeout_s=self._timeout_s)
        except (BusError, ProtocolError) as error:
            log.warning("abort of %d attempts at %s failed: %s", len(keys), instance, error)

    async def close(self) -> None:
        """Wait for aborts under way, at most one command's deadline."""
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=self._timeout_s)
