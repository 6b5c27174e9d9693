"""The suite on one machine: the bus, the services, and whether the gateway is ready."""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from cli.plan import DRAIN_TIMEOUT_S, ProcessSpec
from cli.programs import NatsProgram, Program, ServiceProgram
from cli.supervision import RestartPolicy, Slot
from cli.supervisor import Change, Failure, Supervisor
from shared.bus.nats import NatsBus
from shared.bus.permissions import CLI, LEADER_LEASE_TTL_S, SERVICES, SUPERVISOR, USERS, nats_users
from shared.bus.server import EmbeddedNats
from shared.errors import BusError, ConfigError
from shared.messages import CODEC, subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport

log = logging.getLogger(__name__)

NATS_SLOT = Slot("nats", 0)
SHUTDOWN_MARGIN_S = 8.0
"""What a service may take beyond its drain timeout before it is killed."""
PROBE_TIMEOUT_S = 2.0


class Suite:
    """Everything ``banyan up`` starts. ``start``, then ``until_ready``; ``stop`` whatever happened.

    ``run_dir`` gets a log file for each slot and, until the end, the state of NATS. ``probe_url``
    answers 200 when requests can be served; ``None`` asks nobody. Raises ``ConfigError`` for a
    variable that is wrong.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        run_dir: Path,
        probe_url: str | None,
        on_change: Callable[[Change], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        # A letter first: what looks like a number is one to nats-server.
        self._passwords = {name: f"p{secrets.token_urlsafe(24)}" for name in USERS}
        self._nats_dir = run_dir / f"nats-{os.getpid()}"
        self._nats = EmbeddedNats(
            self._nats_dir,
            users=nats_users(self._passwords.__getitem__, leader_lease_ttl_s=_lease_ttl_s()),
        )
        self._shutdown_s = _drain_timeout_s() + SHUTDOWN_MARGIN_S
        self._bus: NatsBus | None = None
        self._probe_url = probe_url
        self._news = asyncio.Event()
        self._supervisor = Supervisor(
            [NatsProgram(NATS_SLOT, self._nats), *(self._program(spec, run_dir) for spec in specs)],
            on_change=on_change,
            on_death=self._announce_death,
            policy=policy,
        )

    @property
    def supervisor(self) -> Supervisor:
        """Who holds the processes."""
        return self._supervisor

    @property
    def nats_url(self) -> str:
        """Where the bus is. Raises ``BusError`` before ``start``."""
        return self._nats.url

    @property
    def cli_credentials(self) -> tuple[str, str]:
        """User and password of the commands."""
        return CLI, self._passwords[CLI]

    async def start(self) -> None:
        """Start the bus, then all services; returns at once.

        Raises ``BusError`` or ``ConfigError`` if the bus cannot be started.
        """
        await self._nats.start()
        self._bus = NatsBus(
            CODEC,
            self._nats.url,
            name="banyan up",
            user=SUPERVISOR,
            password=self._passwords[SUPERVISOR],
        )
        await self._bus.connect()
        await self._bus.subscribe(subjects.all_load(), self._on_report)
        self._supervisor.start()

    async def until_ready(self) -> None:
        """Return when every process has reported and the gateway says that it is ready."""
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S) as http:
            while not (self._supervisor.is_ready and await self._is_gateway_ready(http)):
                # Reports come many times a second, and nothing gets ready without one.
                await self._news.wait()
                self._news.clear()

    async def until_failed(self) -> Failure:
        """Return if a process cannot be made to run."""
        return await self._supervisor.until_failed()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drain and end all there is, the bus last; from ``hurry`` on, kill."""
        if self._bus is not None:
            await self._bus.close(timeout_s=0.0)  # nothing more is to be heard or announced
        try:
            await self._supervisor.stop(deadline_s=self._shutdown_s, hurry=hurry)
        finally:
            await self._nats.stop()
            await asyncio.to_thread(shutil.rmtree, self._nats_dir, ignore_errors=True)

    def _program(self, spec: ProcessSpec, log_dir: Path) -> Program:
        def connection() -> Mapping[str, str]:
            return {
                "BANYAN_NATS_URL": self._nats.url,
                "BANYAN_NATS_USER": spec.slot.role,
                "BANYAN_NATS_PASSWORD": self._passwords[spec.slot.role],
            }

        return ServiceProgram(spec, log_dir=log_dir, connection=connection)

    async def _on_report(self, message: Message, subject: str) -> None:
        if isinstance(message, WorkerReport | ServiceReport):
            if message.state is InstanceState.READY:
                self._supervisor.became_ready(message.instance)
            self._news.set()

    async def _announce_death(self, slot: Slot, instance: str, exit_code: int) -> None:
        """Tell the others at once what they would only conclude from its silence."""
        if slot.role not in SERVICES or self._bus is None:
            return
        message = InstanceExited(role=slot.role, instance=instance, exit_code=exit_code)
        try:
            await self._bus.publish(subjects.load(slot.role, instance), message)
        except BusError as error:
            log.warning("the death of %s could not be announced: %s", instance, error)

    async def _is_gateway_ready(self, http: httpx.AsyncClient) -> bool:
        if self._probe_url is None:
            return True
        try:
            response = await http.get(self._probe_url)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK


def _lease_ttl_s() -> float:
    return _seconds("BANYAN_SCHEDULER_LEASE_TTL_S", LEADER_LEASE_TTL_S)


def _drain_timeout_s() -> float:
    """The longest that any service was told to take."""
    names = ["BANYAN_DRAIN_TIMEOUT_S", *(f"BANYAN_{r.upper()}_DRAIN_TIMEOUT_S" for r in SERVICES)]
    given = [name for name in names if os.environ.get(name)]
    return max((_seconds(name, 0.0) for name in given), default=DRAIN_TIMEOUT_S)


def _seconds(variable: str, default: float) -> float:
    """The number in ``variable``; raises ``ConfigError`` if it is none."""
    text = os.environ.get(variable)
    if not text:
        return default
    with contextlib.suppress(ValueError):
        return float(text)
    raise ConfigError(f"{variable}={text!r}: not a number of seconds")
