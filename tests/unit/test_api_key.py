"""Keys without a database: their text, what is never shown of them, and when they end."""

import hashlib
import io
import json
import logging
from datetime import UTC, datetime, timedelta

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from cli.keys import expiry_of
from services.gateway.auth import KeyRing
from services.gateway.errors import api_error
from shared.api_key import KeyText, without_secrets
from shared.db.keys import KeyRecord
from shared.errors import ModelNotFound
from shared.logging import configure

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
KEY = KeyText(id="0123456789ab", secret="S" * 43)


def record_of(key: KeyText, **changes: datetime | None) -> KeyRecord:
    times: dict[str, datetime | None] = {"expires_at": None, "revoked_at": None, **changes}
    return KeyRecord(
        id=key.id,
        tenant="acme",
        name="",
        secret_sha256=key.digest(),
        created_at=NOW,
        expires_at=times["expires_at"],
        revoked_at=times["revoked_at"],
    )


def test_a_key_is_read_back_from_its_text() -> None:
    keys = [KeyText.random() for _ in range(100)]
    assert [KeyText.parse(key.text) for key in keys] == keys
    assert len({key.id for key in keys}) == len({key.secret for key in keys}) == 100
    assert all(len(key.text) == 59 and key.text.startswith(f"bn-{key.id}-") for key in keys)


def test_what_is_stored_is_the_hash_of_the_secret_alone() -> None:
    assert KEY.digest() == hashlib.sha256(b"S" * 43).digest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "sk-0123456789ab-" + "S" * 43,
        "bn-0123456789ab-" + "S" * 42,
        "bn-0123456789ab-" + "S" * 44,
        "bn-0123456789AB-" + "S" * 43,
        "bn-0123456789ab-" + "é" * 43,
        "bn-0123456789ab-" + "٣" * 43,
        " bn-0123456789ab-" + "S" * 43,
        "bn-0123456789ab-" + "S" * 43 + "\n",
    ],
)
def test_what_has_not_the_form_is_no_key(text: str) -> None:
    assert KeyText.parse(text) is None


@given(st.text())
def test_any_text_can_be_asked_about(text: str) -> None:
    assert KeyText.parse(text) is None
    assert without_secrets(text) == text


@given(st.text(), st.text())
def test_no_text_around_a_key_saves_its_secret(before: str, behind: str) -> None:
    shown = without_secrets(before + KEY.text + behind)
    assert KEY.secret not in shown
    assert f"bn-{KEY.id}-***" in shown


def test_of_a_key_that_is_cut_off_nothing_is_shown_either() -> None:
    assert without_secrets(f"?key={KEY.text[:30]}&x=1") == f"?key=bn-{KEY.id}-***&x=1"
    assert KEY.secret not in repr(KEY)


@pytest.mark.parametrize("is_json", [True, False])
def test_logs_do_not_show_secrets_wherever_they_come_from(is_json: bool) -> None:
    stream = io.StringIO()
    configure("gateway", "g", json=is_json, stream=stream)
    log = logging.getLogger("banyan.test")
    log.warning("asked with %s", KEY.text, extra={"path": f"/v1/models?key={KEY.text}"})
    try:
        raise ValueError(KEY.text)
    except ValueError:
        log.exception("failed")
    logging.captureWarnings(False)
    assert KEY.secret not in stream.getvalue()
    assert stream.getvalue().count(f"bn-{KEY.id}-***") == 3


def test_errors_do_not_repeat_a_key_that_was_sent_as_something_else() -> None:
    error = api_error(ModelNotFound(f"the model {KEY.text!r} is not served here", field="model"))
    message = json.loads(error.body())["error"]["message"]
    assert message == f"the model 'bn-{KEY.id}-***' is not served here"


def test_a_key_opens_only_what_is_its_own() -> None:
    other = KeyText(id="ba9876543210", secret="T" * 43)
    ring = KeyRing([record_of(KEY), record_of(other)])
    found = ring.record_of(KEY)
    assert found is not None and found.id == KEY.id
    assert ring.record_of(KeyText(id=KEY.id, secret=other.secret)) is None
    assert ring.record_of(KeyText(id="000000000000", secret=KEY.secret)) is None


def test_keys_are_asked_for_as_soon_as_there_was_one() -> None:
    assert not KeyRing([]).has_any
    assert KeyRing([record_of(KEY, revoked_at=NOW)]).has_any
    assert KeyRing([record_of(KEY)]).has_any
    assert KeyRing([record_of(KEY, expires_at=NOW - timedelta(days=9))]).has_any


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90m", NOW + timedelta(minutes=90)),
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + timedelta(days=30)),
        ("8w", NOW + timedelta(weeks=8)),
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC)),
        ("2026-12-31T18:00", datetime(2026, 12, 31, 18, tzinfo=UTC)),
        ("2026-12-31T18:00+02:00", datetime(2026, 12, 31, 16, tzinfo=UTC)),
        ("2026-12-31T18:00:00Z", datetime(2026, 12, 31, 18, tzinfo=UTC)),
    ],
)
def test_when_a_key_ends(text: str, expected: datetime) -> None:
    assert expiry_of(text, NOW) == expected


@pytest.mark.parametrize(
    "text", ["", "30", "d", "-3d", "0d", "1.5h", "30 days", "tomorrow", "2026-02-30", "999999w"]
)
def test_what_is_no_end(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="neither a time span"):
        expiry_of(text, NOW)


@pytest.mark.parametrize("text", ["2026-03-01", "2026-03-01T12:30", "2020-01-01"])
def test_an_end_that_is_past_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is past"):
        expiry_of(text, NOW)
