"""What the log of a service says about its start: how far it is, why it failed, what to do. Pure.

Logs are read because a process that loads a model is not on the bus yet.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

_PROGRESS = re.compile(r"^\S+ INFO +\S+ [\w.]+: (?P<what>.+) fraction=(?P<fraction>[01](\.\d+)?)$")
_RAISED = re.compile(r"^(?:shared\.errors\.|torch\.(?:cuda\.)?)?(?P<kind>[A-Za-z]+): (?P<text>.+)$")
_KINDS = ("ConfigError", "UnsupportedModel", "OutOfMemory", "OutOfMemoryError")
_HOPELESS = ("ConfigError", "UnsupportedModel")

_ADVICE = {
    "OutOfMemory": (
        "try another --memory-fraction, fewer workers (--prefill, --decode), --quantization int8, "
        "or a smaller model"
    ),
    "UnsupportedModel": "docs/models.md says which models are served",
}
_KILLED_ADVICE = (
    "the system may have killed it for want of memory: try a smaller --memory-fraction, fewer "
    "workers, or a smaller model"
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far loading is: what is being done, and a share 0..1 of the whole."""

    what: str
    fraction: float


@dataclass(frozen=True, kw_only=True)
class LoggedError:
    """The error of ours that ended a process; ``is_hopeless``: the next one would end alike."""

    kind: str
    text: str

    @property
    def is_hopeless(self) -> bool:
        """Whether trying again is no use."""
        return self.kind in _HOPELESS

    def __str__(self) -> str:
        """For people, who need not know what it is called in the code."""
        return self.text


def progress_in(line: str) -> Progress | None:
    """What a line of a log, in either format, says about loading."""
    if line.startswith("{"):
        record = _record(line)
        fraction = record.get("fraction")
        if not isinstance(fraction, int | float):
            return None
        return Progress(what=str(record.get("msg")), fraction=float(fraction))
    found = _PROGRESS.match(line)
    if found is None:
        return None
    return Progress(what=found["what"], fraction=float(found["fraction"]))


def error_in(log_tail: str) -> LoggedError | None:
    """The last error of ours in the end of a log, in either format."""
    for line in reversed(log_tail.splitlines()):
        text = str(_record(line).get("exception", "")) if line.startswith("{") else line
        found = _last_raised(text.splitlines())
        if found is not None:
            return found
    return None


def advice_for(error: LoggedError | None, exit_code: int) -> str | None:
    """What the user can do about it, ``None`` if the error itself says so or nobody knows."""
    if error is not None:
        return _ADVICE.get(error.kind)
    return _KILLED_ADVICE if exit_code == -9 else None


def _last_raised(lines: Iterable[str]) -> LoggedError | None:
    last = None
    for line in lines:
        found = _RAISED.match(line)
        if found is not None and found["kind"] in _KINDS:
            kind = "OutOfMemory" if found["kind"] == "OutOfMemoryError" else found["kind"]
            last = LoggedError(kind=kind, text=found["text"])
    return last


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
