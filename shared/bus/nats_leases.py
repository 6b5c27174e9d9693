"""Leases in a JetStream key-value bucket.

The bucket is laid out as every NATS client lays out a KV bucket, so ``nats kv`` can read it. It is
spoken to by JetStream's API over plain requests rather than by nats-py's ``KeyValue``, which (2.16)
does not take the marker the server leaves for an expired key for an absence, so that its ``create``
fails and its ``get`` returns an empty value until the marker is gone too.
"""

import base64
import json
import logging
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nats.js import api
from typing_extensions import override

from shared.bus.jetstream import (
    EXPECTED_REVISION_HEADER,
    HOLDER_HEADER,
    NO_MESSAGE_FOUND,
    OPERATION_HEADER,
    STREAM_NAME_IN_USE,
    STREAM_NOT_FOUND,
    WRONG_LAST_SEQUENCE,
    JetStreamError,
    KeyState,
    read_answer,
    read_headers,
    read_state,
)
from shared.bus.leases import (
    Lease,
    LeaseStore,
    LeaseWatch,
    check_lease_key,
    check_lease_pattern,
    lease_bucket,
)
from shared.bus.nats_lease_watch import NatsLeaseWatch
from shared.errors import BusError, LeaseLost, NoResponder

if TYPE_CHECKING:
    from shared.bus.nats import NatsBus

logger = logging.getLogger(__name__)

_MAX_CONFLICTS = 3


class NatsLeaseStore(LeaseStore):
    """See ``LeaseStore``. The server notices an expiry up to about 0.3 s late, never early.

    If the bucket is gone (JetStream lost its disk) it is made again; its revisions begin at the
    wall clock in milliseconds, so that they still grow.
    """

    def __init__(self, bus: "NatsBus", ttl_s: float) -> None:
        self._bus = bus
        self._ttl_s = ttl_s
        self._holder = secrets.token_hex(8)
        self._timeout_s = min(max(ttl_s / 4, 0.25), 5.0)
        self.bucket = lease_bucket(ttl_s)
        self.stream = f"KV_{self.bucket}"

    @property
    @override
    def ttl_s(self) -> float:
        return self._ttl_s

    # The bucket

    async def make_bucket(self) -> None:
        """Make the bucket unless it is there. Raises ``BusError`` if it is there, but different."""
        try:
            info = await self._call_once(f"STREAM.INFO.{self.stream}", {})
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
            info = await self._create_stream()
        max_age_s = info["config"].get("max_age", 0) / 1e9
        if max_age_s != self._ttl_s:
            raise BusError(
                f"bucket {self.bucket} keeps leases for {max_age_s:g} s, not {self._ttl_s:g} s"
            )

    async def _create_stream(self) -> dict[str, Any]:
        config = api.StreamConfig(
            name=self.stream,
            subjects=[f"$KV.{self.bucket}.>"],
            max_age=self._ttl_s,
            max_msgs_per_subject=1,
            first_seq=time.time_ns() // 1_000_000,
            discard=api.DiscardPolicy.NEW,
            storage=api.StorageType.FILE,
            num_replicas=1,
            duplicate_window=min(self._ttl_s, 120.0),
            allow_rollup_hdrs=True,
            deny_delete=True,
            allow_direct=True,
            allow_msg_ttl=True,
            # Without it nobody hears of an expiry; one second is the least the server takes.
            subject_delete_marker_ttl=max(1.0, self._ttl_s),
        )
        try:
            return await self._call_once(f"STREAM.CREATE.{self.stream}", config.as_dict())
        except JetStreamError as error:
            if error.code != STREAM_NAME_IN_USE:
                raise
            return await self._call_once(f"STREAM.INFO.{self.stream}", {})

    async def _call_once(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call of JetStream's API; raises ``JetStreamError``."""
        data = json.dumps(body).encode() if body else b""
        reply = await self._bus.ask_raw(f"$JS.API.{verb}", data, timeout_s=self._timeout_s)
        return read_answer(reply.data)

    async def call_api(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call of JetStream's API, making the bucket again if it is gone."""
        try:
            return await self._call_once(verb, body)
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
        logger.error("lease bucket %s is gone; making it again", self.bucket)
        await self.make_bucket()
        return await self._call_once(verb, body)

    # Keys

    async def _read(self, key: str) -> KeyState:
        """The state of ``key``, from the stream's leader (a direct get may lag in a cluster)."""
        try:
            body = {"last_by_subj": f"$KV.{self.bucket}.{key}"}
            message = (await self.call_api(f"STREAM.MSG.GET.{self.stream}", body))["message"]
        except JetStreamError as error:
            if error.code != NO_MESSAGE_FOUND:
                raise
            return KeyState(revision=0)
        headers = read_headers(base64.b64decode(message.get("hdrs", "")))
        return read_state(message["seq"], headers, base64.b64decode(message.get("data", "")))

    async def _write(
        self, key: str, value: str, *, after: int, headers: Mapping[str, str]
    ) -> int | None:
        """Write if the last revision is ``after``; the new revision, ``None`` on a conflict."""
        subject = f"$KV.{self.bucket}.{key}"
        all_headers = {EXPECTED_REVISION_HEADER: str(after), **headers}
        try:
            reply = await self._bus.ask_raw(
                subject, value.encode(), timeout_s=self._timeout_s, headers=all_headers
            )
        except NoResponder:
            logger.error("lease bucket %s is gone; making it again", self.bucket)
            await self.make_bucket()
            return None
        try:
            return int(read_answer(reply.data)["seq"])
        except JetStreamError as error:
            if error.code not in WRONG_LAST_SEQUENCE:
                raise
            return None

    def _is_ours(self, state: KeyState, value: str) -> bool:
        return state.holder == self._holder and state.value == value

    async def _hold(self, key: str, value: str, *, after: int) -> int | None:
        return await self._write(key, value, after=after, headers={HOLDER_HEADER: self._holder})

    @override
    async def try_acquire(self, key: str, value: str) -> Lease | None:
        check_lease_key(key)
        for _ in range(_MAX_CONFLICTS):
            state = await self._read(key)
            if state.holder is not None and not self._is_ours(state, value):
                return None
            revision = await self._hold(key, value, after=state.revision)
            if revision is not None:
                return Lease(key, value, revision)
        return None

    @override
    async def renew(self, lease: Lease) -> Lease:
        revision = await self._hold(lease.key, lease.value, after=lease.revision)
        if revision is None:
            state = await self._read(lease.key)
            if self._is_ours(state, lease.value):  # an earlier acknowledgement was lost
                revision = await self._hold(lease.key, lease.value, after=state.revision)
        if revision is None:
            raise LeaseLost(f"the lease on {lease.key} has expired or is another's")
        return Lease(lease.key, lease.value, revision)

    @override
    async def release(self, lease: Lease) -> None:
        headers = {OPERATION_HEADER: "DEL"}
        if await self._write(lease.key, "", after=lease.revision, headers=headers) is None:
            state = await self._read(lease.key)
            if self._is_ours(state, lease.value):
                await self._write(lease.key, "", after=state.revision, headers=headers)

    @override
    async def get(self, key: str) -> Lease | None:
        check_lease_key(key)
        state = await self._read(key)
        return None if state.holder is None else Lease(key, state.value, state.revision)

    @override
    def watch(self, key: str) -> LeaseWatch:
        check_lease_pattern(key)
        return NatsLeaseWatch(self._bus, self.bucket, key, self.call_api)
