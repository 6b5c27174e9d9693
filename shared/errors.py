"""The one error tree. Third-party errors are mapped into it where they enter.

::

    BanyanError
    ├── ConfigError               a setting is missing or wrong (names the key and its value)
    ├── InvalidRequest            the caller's fault, HTTP 4xx (names the field)
    │   ├── ModelNotFound
    │   ├── ContextLengthExceeded
    │   └── services.gateway.errors: AuthenticationFailed, PayloadTooLarge,
    │       UnsupportedMediaType, BodyTimeout
    ├── Refused                   cannot be taken now, HTTP 429 (says when to come back)
    │   └── services.gateway.generation: Unserved (nobody serves the model, HTTP 503)
    ├── RequestFailed             accepted, but could not be finished, HTTP 500/503
    ├── LifecycleError            an event that the state does not allow
    ├── StaleCommand              older attempt or leader epoch than the receiver has seen
    ├── ProtocolError             bytes that are no message of ours
    │   └── UnknownMessage
    ├── BusError
    │   ├── BusTimeout
    │   ├── NoResponder
    │   ├── BusDisconnected
    │   ├── LeaseLost
    │   ├── shared.bus.jetstream: JetStreamError
    │   └── RemoteError           the other side answered with an error
    ├── DatabaseError             the database does not answer, or not as it should
    │   └── DatabaseRefused       it answers, and does not take these values
    ├── TransportError
    │   ├── TransferTimeout
    │   ├── PeerGone
    │   └── ChecksumMismatch
    └── EngineError
        ├── UnsupportedModel
        ├── OutOfMemory           the pool or the model does not fit (names the numbers)
        └── OutOfBlocks           the pool has too few free blocks now

Standard library only, so that ``shared/core`` and ``shared/engine`` may use it.
"""


class BanyanError(Exception):
    """Root of every error raised on purpose by this project."""


class ConfigError(BanyanError):
    """A setting is missing or wrong; the message names the key and its value."""


class InvalidRequest(BanyanError):
    """The caller's input is wrong.

    ``field`` is the JSON path of the offending field (``messages[0].content``), or ``None`` when
    the body as a whole is at fault. ``code`` is the OpenAI error code, ``status`` the HTTP status.
    """

    status = 400
    code = "invalid_value"

    def __init__(self, message: str, *, field: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        if code is not None:
            self.code = code


class ModelNotFound(InvalidRequest):
    """The named model is not served here."""

    status = 404
    code = "model_not_found"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and ``max_tokens`` do not fit into the model's context."""

    code = "context_length_exceeded"


class Refused(BanyanError):
    """Cannot be taken now; nothing was lost, the caller may try again after ``retry_after_s``."""

    def __init__(self, reason: str, *, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RequestFailed(BanyanError):
    """An accepted request ended without its answer; the message says why."""


class LifecycleError(BanyanError):
    """An event arrived that the request's state does not allow."""


class StaleCommand(BanyanError):
    """A command of an older attempt or leader epoch; it was dropped and counted."""


class ProtocolError(BanyanError):
    """Bytes that are not a message of ours."""


class UnknownMessage(ProtocolError):
    """A message whose tag this version does not know."""


class BusError(BanyanError):
    """The control plane did not do what was asked."""


class BusTimeout(BusError):
    """No answer within the deadline."""


class NoResponder(BusError):
    """Nobody serves the subject."""


class BusDisconnected(BusError):
    """The connection is down; it is being re-established."""


class LeaseLost(BusError):
    """The lease expired or belongs to somebody else by now."""


class RemoteError(BusError):
    """The other side answered with an error; ``code`` is its class name there."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DatabaseError(BanyanError):
    """The database does not answer, or not as it should; it may do so later."""


class DatabaseRefused(DatabaseError):
    """The database answers, and does not take these values: a constraint, or their form."""


class TransportError(BanyanError):
    """The data plane did not do what was asked."""


class TransferTimeout(TransportError):
    """A transfer missed its deadline; its buffer stays in quarantine until the endpoint closes."""


class PeerGone(TransportError):
    """The other end closed or cannot be reached."""


class ChecksumMismatch(TransportError):
    """The bytes that arrived are not the bytes that were sent."""


class EngineError(BanyanError):
    """The engine cannot do what was asked."""


class UnsupportedModel(EngineError):
    """The model cannot be served; the message says why."""


class OutOfMemory(EngineError):
    """The model or the KV pool does not fit; the message names the numbers."""


class OutOfBlocks(EngineError):
    """Too few free KV blocks at this moment."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} KV blocks needed, {free} free")
        self.needed = needed
        self.free = free
