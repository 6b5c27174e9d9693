import asyncio
import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from shared.logging import bind, bound_fields, configure

_log = logging.getLogger("banyan.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Give the root logger back as it was: ``configure`` is for whole processes."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_of_json() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", stream=stream)
    _log.info("sent %d tokens\nin two lines", 7, extra={"took_s": 0.5, "path": object})
    (record,) = lines(stream)
    assert datetime.fromisoformat(record.pop("ts")).utcoffset() is not None
    assert record == {
        "level": "info",
        "service": "gateway",
        "instance": "gateway-1",
        "logger": "banyan.test",
        "msg": "sent 7 tokens\nin two lines",
        "took_s": 0.5,
        "path": str(object),
    }


def test_an_exception_carries_its_traceback() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        _log.exception("failed")
    (record,) = lines(stream)
    assert record["msg"] == "failed"
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ValueError: boom")


def test_bound_fields_nest_and_end() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", stream=stream)
    with bind(request_id="r1", attempt=0):
        with bind(attempt=1):
            _log.info("inner")
        _log.info("outer")
    _log.info("outside")
    found = [(r["msg"], r.get("request_id"), r.get("attempt")) for r in lines(stream)]
    assert found == [("inner", "r1", 1), ("outer", "r1", 0), ("outside", None, None)]


def test_a_field_cannot_hide_a_fixed_one() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", stream=stream)
    with bind(service="evil", level="none"):
        _log.info("hello")
    (record,) = lines(stream)
    assert (record["service"], record["level"]) == ("gateway", "info")


async def test_tasks_keep_their_own_fields() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", stream=stream)
    met = asyncio.Barrier(2)

    async def handle(request_id: str) -> None:
        with bind(request_id=request_id):
            await met.wait()
            _log.info("handled", extra={"expected": request_id})

    await asyncio.gather(handle("a"), handle("b"))
    records = lines(stream)
    assert sorted(r["request_id"] for r in records) == ["a", "b"]
    assert all(r["request_id"] == r["expected"] for r in records)
    assert dict(bound_fields()) == {}


def test_a_terminal_gets_text_unless_told_otherwise() -> None:
    stream = Terminal()
    configure("gateway", "gateway-1", stream=stream)
    with bind(request_id="r1"):
        _log.warning("slow", extra={"took_s": 2})
    assert stream.getvalue().endswith(
        " WARNING gateway-1 banyan.test: slow request_id=r1 took_s=2\n"
    )
    stream = Terminal()
    configure("gateway", "gateway-1", json=True, stream=stream)
    _log.warning("slow")
    assert lines(stream)[0]["msg"] == "slow"


def test_text_shows_tracebacks() -> None:
    stream = io.StringIO()
    configure("gateway", "gateway-1", json=False, stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        _log.exception("failed")
    assert "failed\nTraceback" in stream.getvalue()


def test_the_level_is_a_threshold_and_configure_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("gateway", "gateway-1", stream=first)
    configure("gateway", "gateway-1", "warning", stream=second)
    _log.info("quiet")
    _log.warning("loud")
    assert first.getvalue() == ""
    assert [r["msg"] for r in lines(second)] == ["loud"]
    with pytest.raises(ValueError, match="LOUD"):
        configure("gateway", "gateway-1", "loud")
