"""The outermost layer of the application: every response has an id, and no error gets past it."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import api_error, log_if_unexpected

HEADER = "x-request-id"

_SANE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Names each request and puts the name into its response.

    ``scope["state"]`` gets ``request_id``, always our own and never reused, and
    ``client_request_id``: the caller's ``x-request-id`` if it is 1 to 128 printable ASCII
    characters, else ``None``. The response carries the caller's, or ours where there is none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; an error that nothing else has answered becomes a plain 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        client_id = Headers(scope=scope).get(HEADER, "")
        is_sane = _SANE.fullmatch(client_id) is not None
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client_request_id"] = client_id if is_sane else None
        is_started = False

        async def send_named(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)[HEADER] = client_id if is_sane else request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:  # the last place where it can still be answered
            log_if_unexpected(error, request_id)
            if is_started:
                raise
            await api_error(error).response()(scope, receive, send_named)
