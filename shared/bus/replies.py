"""The requests of one bus that wait for an answer."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shared.errors import BusError, BusTimeout, NoResponder


@dataclass(frozen=True)
class RawReply:
    """An answer as it came: ``headers`` are empty except from JetStream."""

    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class PendingRequest:
    """One request: ``done`` is set when the wanted number of answers is there, or fails.

    ``num_wanted`` is ``None`` if only time can end the gathering.
    """

    def __init__(self, subject: str, num_wanted: int | None) -> None:
        self.subject = subject
        self.answers: list[RawReply] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_wanted = num_wanted

    def accept(self, reply: RawReply) -> None:
        """Keep one answer."""
        self.answers.append(reply)
        if len(self.answers) == self._num_wanted:
            self.finish()

    def finish(self) -> None:
        """No more answers are awaited."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: BusError) -> None:
        """The request fails, unless it is done."""
        if not self.done.done():
            self.done.set_exception(error)


class PendingReplies:
    """Finds the request an answer belongs to. Tokens are never used twice."""

    def __init__(self) -> None:
        self._num_opened = 0
        self._pending: dict[str, PendingRequest] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, subject: str, num_wanted: int | None) -> tuple[str, PendingRequest]:
        """A new request to ``subject`` and the token its answers will carry."""
        self._num_opened += 1
        token = f"{self._num_opened:x}"
        request = self._pending[token] = PendingRequest(subject, num_wanted)
        return token, request

    def close(self, token: str) -> None:
        """Forget a request, whatever became of it; later answers are ignored."""
        request = self._pending.pop(token)
        if not request.done.cancel() and not request.done.cancelled():
            request.done.exception()  # marks it as seen: the caller may have raised another one

    def resolve(self, token: str, reply: RawReply) -> None:
        """An answer has come."""
        request = self._pending.get(token)
        if request is not None:
            request.accept(reply)

    def no_responder(self, token: str) -> None:
        """The server knows nobody who could answer."""
        request = self._pending.get(token)
        if request is not None:
            request.fail(NoResponder(f"nobody serves {request.subject}"))

    def expire(self, token: str, timeout_s: float) -> None:
        """The time of a request is over."""
        request = self._pending.get(token)
        if request is not None:
            request.fail(BusTimeout(f"no answer on {request.subject} within {timeout_s:g} s"))

    def fail_where(
        self, concerns: Callable[[str], bool], make_error: Callable[[], BusError]
    ) -> None:
        """Fail every request whose subject ``concerns`` says yes to, each with its own error."""
        for request in self._pending.values():
            if concerns(request.subject):
                request.fail(make_error())
