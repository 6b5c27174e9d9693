"""The UCX library: loaded only when asked for, set up for processes that may die.

Why endpoints here always have error handling on. Measured with ucxx 0.52 / UCX 1.21 over shared
memory; a *sender* is killed while it sends:

=====================================  ====================================================
endpoint error handling off (CMA)      the **receiver is aborted** by UCX (SIGABRT) when it
                                       next reads from the dead process
on, one worker for all peers           the receiver's shared-memory inbox is stuck for good,
                                       for **all** peers, in 11 of 12 tries (also by SIGSTOP)
on, one worker for each peer (ours)    that link is lost, nothing else happens
=====================================  ====================================================

With error handling on, UCX uses shared memory only if ``MM_ERROR_HANDLING`` is set too, and copies
in and out of it in fragments instead of reading the peer's memory: as fast at 1 MiB and above,
half as fast at 64 KiB; nothing is written behind a receiver's back; and no single step blocks.
"""

import importlib
import ipaddress
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import TransportError

DEFAULTS = {
    "TLS": "sysv,self,tcp",
    "MM_ERROR_HANDLING": "y",
}
"""UCX settings, each overruled by an environment variable ``UCX_<name>`` of the user.

One kind of shared memory is enough and halves what a link costs (2 MiB); System V's does not
depend on the size of ``/dev/shm``. CMA is of no use with error handling on.
"""


_SET_BY_UCXX = {
    "UCX_RNDV_THRESH": "8192",
}
"""What ucxx puts into the environment as it is imported, so that it is not taken for the user's."""

_CHECK_BYTES = 100_000
_CHECK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class UcxLibrary:
    """What is used of ucxx; its low-level classes, which have no module-global state."""

    api: Any
    array: Any
    error: type[Exception]
    user_settings: frozenset[str]

    @classmethod
    def load(cls) -> "UcxLibrary":
        """Import ucxx; about 0.6 s the first time. Raises ``TransportError`` if it cannot be."""
        user_settings = frozenset(
            name
            for name, value in os.environ.items()
            if name.startswith("UCX_") and _SET_BY_UCXX.get(name) != value
        )
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        os.environ.setdefault("UCX_LOG_FILE", "stderr")  # stdout belongs to the program
        try:
            importlib.import_module("ucxx")
            api = importlib.import_module("ucxx._lib.libucxx")
            array = importlib.import_module("ucxx._lib.arr")
        except (ImportError, OSError) as error:
            raise TransportError(f"ucxx cannot be imported: {error}") from error
        return cls(api, array.Array, api.UCXError, user_settings)

    @staticmethod
    def version() -> str:
        """The version of ucxx, and of the UCX that it has loaded."""
        ucxx = importlib.import_module("ucxx")
        return f"{ucxx.__version__} (UCX {ucxx.__ucx_version__})"

    def new_context(self, *, host: str, settings: Mapping[str, str] | None = None) -> Any:
        """A UCX context for workers that peers reach at ``host``.

        Bound to loopback, UCX listens on loopback too. ``settings`` come on top of ``DEFAULTS``;
        the user's environment beats both. Raises ``TransportError``.
        """
        chosen = {**DEFAULTS, **(settings or {})}
        if _is_loopback(host):
            chosen["NET_DEVICES"] = "lo"
        config = {k: v for k, v in chosen.items() if f"UCX_{k}" not in self.user_settings}
        features = (self.api.Feature.TAG, self.api.Feature.WAKEUP)
        try:
            return self.api.UCXContext(config, features)
        except self.error as error:
            raise TransportError(f"UCX cannot be started with {config}: {error}") from error

    def check(self, *, host: str) -> None:
        """Send a message from one worker to another. Raises ``TransportError`` if it fails."""
        api = self.api
        context = self.new_context(host=host)
        sent, received = bytearray(os.urandom(_CHECK_BYTES)), bytearray(_CHECK_BYTES)
        try:
            one, other = api.UCXWorker(context), api.UCXWorker(context)
            endpoint = api.UCXEndpoint.create_from_worker_address(one, other.address, True)
            requests = [
                other.tag_recv(self.array(received), api.UCXXTag(1)),
                endpoint.tag_send(self.array(sent), api.UCXXTag(1)),
            ]
            deadline_s = time.monotonic() + _CHECK_TIMEOUT_S
            while not all(request.completed for request in requests):
                one.progress_once()
                other.progress_once()
                if time.monotonic() > deadline_s:
                    raise TransportError(f"UCX moved nothing in {_CHECK_TIMEOUT_S} s")
            for request in requests:
                request.check_error()
            endpoint.close_blocking()
        except self.error as error:
            raise TransportError(f"UCX does not work: {error}") from error
        if sent != received:
            raise TransportError("UCX delivered other bytes than were sent")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
