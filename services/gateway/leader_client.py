"""Talking to the leading scheduler, whoever it is just now: every word is repeated until heard."""

import asyncio
import logging

from services.gateway.config import GatewaySettings
from services.gateway.generation import Unserved
from services.gateway.live_request import LiveRequest
from shared.bus.base import Bus
from shared.clock import Clock
from shared.errors import BusError, NoResponder, ProtocolError, Refused
from shared.messages import subjects
from shared.messages.requests import (
    CloseRequest,
    Done,
    SubmitReply,
    SubmitRequest,
    SubmitStatus,
)

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.02
LAST_RETRY_S = 0.5


class LeaderClient:
    """Submits attempts and closes requests at the leader, through the change of leaders."""

    def __init__(self, bus: Bus, settings: GatewaySettings, clock: Clock) -> None:
        self._bus = bus
        self._settings = settings
        self._clock = clock

    async def submit(
        self, live: LiveRequest, model: str, *, give_up_s: float, is_resend: bool = False
    ) -> SubmitReply | None:
        """Tell the leader of the current attempt until it answers.

        ``None`` if the request has ended meanwhile. Raises ``Refused`` at once when refused and
        ``Unserved`` after ``give_up_s`` without a leader.
        """
        began_s = self._clock.now_s()
        pause_s = FIRST_RETRY_S
        while not live.is_terminal:
            now_s = self._clock.now_s()
            message = SubmitRequest(
                model=model,
                gateway=self._settings.instance,
                request=live.request(),
                age_s=now_s - live.accepted_s,
                is_resend=is_resend,
            )
            try:
                reply = await self._bus.request(
                    subjects.requests(model),
                    message,
                    SubmitReply,
                    timeout_s=self._settings.submit_timeout_s,
                )
            except (BusError, ProtocolError) as error:
                if self._clock.now_s() - began_s > give_up_s:
                    raise Unserved(
                        f"no scheduler takes requests for {model}: {error}",
                        retry_after_s=LAST_RETRY_S,
                    ) from error
                # An attempt that got no answer may have been taken nevertheless.
                is_resend = is_resend or not isinstance(error, NoResponder)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_RETRY_S)
                continue
            if reply.status is SubmitStatus.REFUSED:
                raise Refused(reply.reason, retry_after_s=reply.retry_after_s)
            return reply
        return None

    async def close(self, model: str, live: LiveRequest) -> None:
        """Say that the request is over; if nobody hears it, the leader's audits will find out."""
        message = CloseRequest(
            model=model,
            request_id=live.request_id,
            attempt=live.attempt,
            outcome=live.state.value,
        )
        deadline_s = self._clock.now_s() + self._settings.close_timeout_s
        pause_s = FIRST_RETRY_S
        while True:
            try:
                await self._bus.request(
                    subjects.requests(model),
                    message,
                    Done,
                    timeout_s=self._settings.submit_timeout_s,
                )
                return
            except (BusError, ProtocolError) as error:
                if self._clock.now_s() > deadline_s:
                    log.warning("closing was not heard: %s", error)
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_RETRY_S)
