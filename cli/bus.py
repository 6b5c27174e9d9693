"""Where the bus of a suite is, and a connection to it for the length of a command."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from cli.errors import CommandFailed
from cli.state import find_suite
from shared.bus.nats import NatsBus
from shared.bus.permissions import CLI
from shared.errors import BusDisconnected, ConfigError
from shared.messages import CODEC

CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class BusAddress:
    """Where the bus is, and as whom to connect.

    ``url`` is the gateway's, if that is known. ``pids``, ``is_ready`` and ``log_dir`` are known of
    a suite that ``banyan up`` runs here: its processes by instance, whether it has started, and
    where its logs are.
    """

    nats_url: str
    user: str | None
    password: str | None = field(repr=False)
    url: str | None = None
    pids: Mapping[str, int] = field(default_factory=dict)
    is_ready: bool = True
    log_dir: str | None = None


def find_bus(
    url: str | None, *, nats_url: str | None = None, user: str | None = None
) -> BusAddress:
    """The bus at ``nats_url`` (or ``BANYAN_NATS_URL``), else that of the suite running here.

    Raises ``CommandFailed`` if there is neither.
    """
    nats_url = nats_url or os.environ.get("BANYAN_NATS_URL")
    if nats_url:
        return _named(nats_url, user or os.environ.get("BANYAN_NATS_USER") or None, url)
    suite = find_suite(url)
    if suite is None:
        where = f" with a gateway at {url}" if url else ""
        raise CommandFailed(
            f"no suite runs here{where}: start one with `make up` (or `banyan up`), or name the "
            "bus of another one with --nats-url (its user with --nats-user, the password in "
            "BANYAN_NATS_PASSWORD)"
        )
    return BusAddress(
        nats_url=suite.nats_url,
        user=suite.nats_user,
        password=suite.nats_password,
        url=suite.url,
        pids=suite.pids,
        is_ready=suite.is_ready,
        log_dir=suite.log_dir,
    )


def _named(nats_url: str, user: str | None, url: str | None) -> BusAddress:
    """The bus at ``nats_url``, which may name user and password too: they are not shown again."""
    parts = urlsplit(nats_url if "://" in nats_url else f"nats://{nats_url}")
    password = os.environ.get("BANYAN_NATS_PASSWORD") or unquote(parts.password or "") or None
    user = user or unquote(parts.username or "") or (CLI if password else None)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return BusAddress(nats_url=bare, user=user, password=password, url=url)


@contextlib.asynccontextmanager
async def connected(address: BusAddress, command: str) -> AsyncIterator[NatsBus]:
    """The bus at ``address``, closed at the end. Raises ``CommandFailed`` if it cannot be had."""
    logging.getLogger("shared.bus").setLevel(logging.CRITICAL)  # the command itself says it
    try:
        bus = NatsBus(
            CODEC,
            address.nats_url,
            name=command,
            user=address.user,
            password=address.password,
            connect_timeout_s=CONNECT_TIMEOUT_S,
        )
        await bus.connect()
    except BusDisconnected as error:
        raise CommandFailed(
            f"the bus at {address.nats_url} does not answer: see whether the suite still runs, and "
            "whether --nats-url (BANYAN_NATS_URL) is right"
        ) from error
    except ConfigError as error:
        raise CommandFailed(
            f"{error}: see --nats-url, --nats-user and BANYAN_NATS_PASSWORD"
        ) from error
    try:
        yield bus
    finally:
        await bus.close(timeout_s=0.0)
