"""The corner of JetStream's API that leases need: calls, errors, and what a key's message says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.bus.leases import LeaseEvent
from shared.errors import BusError

HOLDER_HEADER = "Banyan-Holder"
EXPECTED_REVISION_HEADER = "Nats-Expected-Last-Subject-Sequence"
OPERATION_HEADER = "KV-Operation"
MARKER_HEADER = "Nats-Marker-Reason"

NO_MESSAGE_FOUND = 10037
STREAM_NAME_IN_USE = 10058
STREAM_NOT_FOUND = 10059
WRONG_LAST_SEQUENCE = (10071, 10164)


class JetStreamError(BusError):
    """JetStream refused; ``code`` is its error code."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"JetStream: {description} ({code})")
        self.code = code


@dataclass(frozen=True)
class KeyState:
    """The last message on a key: a lease, or (``holder`` is ``None``) the sign that it ended.

    ``revision`` is 0 if there is no message at all.
    """

    revision: int
    value: str = ""
    holder: str | None = None
    event: LeaseEvent = LeaseEvent.EXPIRED


def read_state(revision: int, headers: Mapping[str, str], data: bytes) -> KeyState:
    """What a message of the bucket says about its key."""
    if OPERATION_HEADER in headers:
        return KeyState(revision, event=LeaseEvent.RELEASED)
    if MARKER_HEADER in headers:
        return KeyState(revision, event=LeaseEvent.EXPIRED)
    return KeyState(revision, data.decode(errors="replace"), headers.get(HOLDER_HEADER, ""))


def read_answer(data: bytes) -> dict[str, Any]:
    """The object JetStream answered with.

    Raises ``JetStreamError`` if it is an error and ``BusError`` if it is no object.
    """
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise BusError(f"JetStream answered with what is not JSON: {data[:80]!r}") from error
    if not isinstance(answer, dict):
        raise BusError(f"JetStream answered with what is no object: {data[:80]!r}")
    failure = answer.get("error")
    if failure is not None:
        code = failure.get("err_code", failure.get("code", 0))
        raise JetStreamError(code, failure.get("description", "failed"))
    return answer


def read_headers(block: bytes) -> dict[str, str]:
    """The headers in a ``NATS/1.0`` block."""
    headers = {}
    for line in block.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return headers
