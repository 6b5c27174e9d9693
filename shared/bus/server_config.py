"""The configuration of nats-server: users, permissions, limits. Also ``deploy/nats.conf``."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.bus.names import inbox_prefix
from shared.errors import ConfigError

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class PasswordFromEnv:
    """A password that the server takes from its environment variable ``name``.

    The server parses the variable's value: one that looks like a number or a boolean is refused,
    so make it begin with a letter.
    """

    name: str

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for what cannot be a variable."""
        if not _VARIABLE.fullmatch(self.name):
            raise ConfigError(f"not the name of an environment variable: {self.name!r}")


@dataclass(frozen=True)
class NatsUser:
    """What one user may do; subjects may have wildcards. Whatever is not named is forbidden.

    Everybody may also listen to the own inbox, and answer (once, within two minutes) the requests
    that arrive.
    """

    password: str | PasswordFromEnv = field(repr=False)
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


def lease_permissions(
    bucket: str, keys: tuple[str, ...] = (">",)
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(publish, subscribe)`` for a user that holds and watches leases of ``bucket``.

    ``keys`` are those it may hold, wildcards allowed. Reading, watching and making the bucket
    cannot be restricted to keys.
    """
    stream = f"KV_{bucket}"
    publish = (
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.CREATE.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}",
        *(f"$KV.{bucket}.{key}" for key in keys),
    )
    return publish, ()


def render_config(
    *,
    host: str,
    port: int,
    store_dir: Path,
    users: Mapping[str, NatsUser],
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    monitoring_port: int | None = None,
) -> str:
    """The text of a ``nats.conf``. ``port=-1`` lets the server choose; no users, no authentication.

    Raises ``ConfigError`` for a user's name that cannot be part of a subject.
    """
    lines = [
        f"host: {json.dumps(host)}",
        f"port: {port}",
        f"max_payload: {max_payload_bytes}",
        "jetstream {",
        f"  store_dir: {json.dumps(str(store_dir))}",
        "}",
    ]
    if monitoring_port is not None:
        lines.append(f"http: {json.dumps(f'{host}:{monitoring_port}')}")
    if users:
        lines += ["authorization {", "  users: ["]
        for name in sorted(users):
            lines += _render_user(name, users[name])
        lines += ["  ]", "}"]
    return "\n".join(lines) + "\n"


def _render_user(name: str, user: NatsUser) -> list[str]:
    if isinstance(user.password, PasswordFromEnv):
        password = f"${user.password.name}"
    else:
        password = json.dumps(user.password)
    subscribe = (*user.subscribe, f"{inbox_prefix(name)}.>")
    return [
        "    {",
        f"      user: {json.dumps(name)}",
        f"      password: {password}",
        "      permissions {",
        f"        publish: {_render_subjects(user.publish)}",
        f"        subscribe: {_render_subjects(subscribe)}",
        '        allow_responses: { max: 1, expires: "2m" }',
        "      }",
        "    }",
    ]


def _render_subjects(subjects: Sequence[str]) -> str:
    """An allow list; where it is empty the server would allow everything, so all is denied."""
    if not subjects:
        return '{ deny: [">"] }'
    return "{ allow: [" + ", ".join(json.dumps(subject) for subject in subjects) + "] }"
