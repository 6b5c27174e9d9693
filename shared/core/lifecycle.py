"""The life of a request as its gateway sees it: a transition table that is data.

::

    RECEIVED ─submit→ QUEUED ─place→ PLACED ─token→ STREAMING ─finish→ FINISHED
                        ↑               │               │
                        └──── lose ─────┴───────────────┘      (the next attempt)
    any live state ─cancel→ CANCELLING ─cancelled→ CANCELLED
    any live state ─fail→ FAILED

Each request reaches exactly one terminal state; an event that the state does not allow raises.
"""

from enum import StrEnum

from shared.errors import LifecycleError


class RequestState(StrEnum):
    """Where a request is."""

    RECEIVED = "received"
    QUEUED = "queued"
    PLACED = "placed"
    STREAMING = "streaming"
    CANCELLING = "cancelling"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestEvent(StrEnum):
    """What can happen to it."""

    SUBMIT = "submit"
    PLACE = "place"
    TOKEN = "token"
    LOSE = "lose"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    CANCELLED = "cancelled"


_S, _E = RequestState, RequestEvent
_LIVE = (_S.RECEIVED, _S.QUEUED, _S.PLACED, _S.STREAMING)

TERMINAL = frozenset({_S.FINISHED, _S.FAILED, _S.CANCELLED})

TRANSITIONS: dict[tuple[RequestState, RequestEvent], RequestState] = {
    (_S.RECEIVED, _E.SUBMIT): _S.QUEUED,
    (_S.QUEUED, _E.PLACE): _S.PLACED,
    (_S.PLACED, _E.PLACE): _S.PLACED,
    (_S.STREAMING, _E.PLACE): _S.STREAMING,
    # A token may overtake the hint that its request was placed.
    (_S.QUEUED, _E.TOKEN): _S.STREAMING,
    (_S.PLACED, _E.TOKEN): _S.STREAMING,
    (_S.STREAMING, _E.TOKEN): _S.STREAMING,
    (_S.QUEUED, _E.LOSE): _S.QUEUED,
    (_S.PLACED, _E.LOSE): _S.QUEUED,
    (_S.STREAMING, _E.LOSE): _S.QUEUED,
    (_S.STREAMING, _E.FINISH): _S.FINISHED,
    # An attempt resumed at its very end may finish without a further token.
    (_S.QUEUED, _E.FINISH): _S.FINISHED,
    (_S.PLACED, _E.FINISH): _S.FINISHED,
    (_S.CANCELLING, _E.CANCELLED): _S.CANCELLED,
    **{(state, _E.FAIL): _S.FAILED for state in _LIVE},
    **{(state, _E.CANCEL): _S.CANCELLING for state in _LIVE},
}


class Lifecycle:
    """The state of one request. Owned by its gateway; nobody else changes it."""

    def __init__(self) -> None:
        self.state = RequestState.RECEIVED

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen to the request any more."""
        return self.state in TERMINAL

    def apply(self, event: RequestEvent) -> RequestState:
        """Take ``event`` and return the new state; raises ``LifecycleError`` if it is illegal."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise LifecycleError(f"{event} is not allowed in state {self.state}")
        self.state = following
        return following
