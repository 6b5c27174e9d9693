"""The started attempts of one engine, by name and by state."""

from collections.abc import Mapping

from shared.core.engine_request import EngineEvent, EngineRequest, EngineState
from shared.core.request import RequestKey

LIVE_STATES = (EngineState.WAITING, EngineState.RUNNING, EngineState.SWAPPED, EngineState.HELD)


class RequestTable:
    """Every live attempt once under its key and once in its state's group.

    A group keeps the order in which its members came into the state, so a batch that nobody joins
    or leaves has the same order in every step.
    """

    def __init__(self) -> None:
        self._by_key: dict[RequestKey, EngineRequest] = {}
        self._by_state: dict[EngineState, dict[RequestKey, EngineRequest]] = {
            state: {} for state in LIVE_STATES
        }
        self.by_key: Mapping[RequestKey, EngineRequest] = self._by_key
        """A live view, not to be changed."""

    def __len__(self) -> int:
        return len(self._by_key)

    def in_state(self, state: EngineState) -> Mapping[RequestKey, EngineRequest]:
        """A live view of those in one of ``LIVE_STATES``, not to be changed."""
        return self._by_state[state]

    def add(self, request: EngineRequest) -> None:
        """Take in a new attempt; its key must not be known."""
        assert request.key not in self._by_key, f"{request.key} is there already"
        self._by_key[request.key] = request
        self._by_state[request.state][request.key] = request

    def apply(self, request: EngineRequest, event: EngineEvent) -> None:
        """Change the state of ``request``, which leaves the table if that ends it.

        Raises ``LifecycleError`` and changes nothing if ``event`` is not allowed.
        """
        before = request.state
        request.apply(event)
        del self._by_state[before][request.key]
        group = self._by_state.get(request.state)
        if group is None:
            del self._by_key[request.key]
        else:
            group[request.key] = request

    def check_integrity(self) -> None:
        """Verify that groups and states agree; raises ``AssertionError``."""
        grouped = 0
        for state, group in self._by_state.items():
            grouped += len(group)
            for key, request in group.items():
                assert request.state is state, f"{key} is {request.state} among the {state}"
                assert self._by_key.get(key) is request, f"{key} is in a group but not in the table"
        assert grouped == len(self._by_key), "an attempt is in no group"
