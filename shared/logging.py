"""Structured logs on stderr: one JSON object a line, or readable text on a terminal.

Modules log through the standard library (``logging.getLogger(__name__)``); only ``shared.runtime``
and the CLI call ``configure``. Fields bound with ``bind`` go into every record written inside the
``with`` block, tasks started there included. The secret of an API key is never written.
"""

import json as json_codec
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

from shared.api_key import without_secrets

# The one piece of module state: a context variable is how a task inherits its request's fields.
_bound: ContextVar[Mapping[str, object]] = ContextVar(
    "banyan_log_fields", default=MappingProxyType({})
)

_STANDARD_ATTRIBUTES = frozenset(vars(logging.LogRecord("", logging.INFO, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
}


@contextmanager
def bind(**fields: object) -> Iterator[None]:
    """Add ``fields`` (``request_id=…``, ``attempt=…``) to every record written in this block.

    Blocks nest; an inner value hides an outer one of the same name. Do not hold a block open
    across a ``yield`` of an async generator: its consumer may live in another context.
    """
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def bound_fields() -> Mapping[str, object]:
    """The fields bound at this point."""
    return _bound.get()


def configure(
    service: str,
    instance: str,
    level: str = "INFO",
    *,
    json: bool | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send all logging of this process to ``stream`` (stderr), replacing earlier handlers.

    ``json`` chooses the format; ``None`` means JSON unless the stream is a terminal. ``level`` is
    one of the standard names, in any case. Raises ``ValueError`` for another one.
    """
    target = sys.stderr if stream is None else stream
    as_json = not target.isatty() if json is None else json
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        JsonFormatter(service, instance) if as_json else TextFormatter(service, instance)
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """Bound fields, then those given as ``extra=`` to the logging call itself."""
    own = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    return {**_bound.get(), **own}


class JsonFormatter(logging.Formatter):
    """One line of JSON a record.

    Keys: ``ts`` (UTC, RFC 3339, milliseconds), ``level``, ``service``, ``instance``, ``logger``,
    ``msg``, the bound and extra fields, and ``exception`` (the traceback) where there is one.
    A field that JSON cannot hold is written as its ``str``; none can hide one of the fixed keys.
    """

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._service = service
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, without its line feed."""
        ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fixed: dict[str, object] = {
            "ts": ts.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "instance": self._instance,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            fixed["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fixed["stack"] = record.stack_info
        extra = {key: value for key, value in _extra_fields(record).items() if key not in fixed}
        line = json_codec.dumps({**fixed, **extra}, default=str, ensure_ascii=False)
        return without_secrets(line)


class TextFormatter(logging.Formatter):
    """A line for people: local time, level, instance, logger, message, ``key=value`` fields."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._who = instance or service

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, followed by its traceback if it has one."""
        clock = f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}"
        fields = "".join(f" {key}={value}" for key, value in _extra_fields(record).items())
        line = (
            f"{clock} {record.levelname:<7} {self._who} {record.name}: "
            f"{record.getMessage()}{fields}"
        )
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        if record.stack_info:
            line = f"{line}\n{self.formatStack(record.stack_info)}"
        return without_secrets(line)
