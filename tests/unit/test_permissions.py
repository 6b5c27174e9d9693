"""Who may say what on the bus, as data: every subject has its users, and nobody has too many."""

import inspect
from pathlib import Path

import pytest

from shared.bus import permissions
from shared.bus.permissions import SERVICES, USERS, nats_users, password_variable
from shared.bus.server_config import NatsUser
from shared.bus.subjects import matches
from shared.messages import subjects

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = {"all_load", "all_request_events", "load_of_role", "token"}


def users() -> dict[str, NatsUser]:
    return nats_users(lambda name: f"secret of {name}")


def who(kind: str, subject: str) -> set[str]:
    return {
        name
        for name, user in users().items()
        if any(matches(pattern, subject) for pattern in getattr(user, kind))
    }


def every_subject() -> list[str]:
    """One example of what each function of ``subjects`` builds; roles are roles, names are new."""
    examples = []
    for name, build in inspect.getmembers(subjects, inspect.isfunction):
        if name not in PATTERNS:
            parameters = inspect.signature(build).parameters
            values = {key: "prefill" if key == "role" else "some-name" for key in parameters}
            examples.append(build(**values))
    return examples


def test_every_subject_has_somebody_who_says_it_and_somebody_who_hears_it() -> None:
    subjects_ = every_subject()
    assert len(subjects_) > 10
    assert [subject for subject in subjects_ if not who("publish", subject)] == []
    assert [subject for subject in subjects_ if not who("subscribe", subject)] == []


@pytest.mark.parametrize(
    ("subject", "speakers"),
    [
        (subjects.requests("m"), {"gateway"}),
        (subjects.worker("prefill", "p", "start"), {"scheduler"}),
        (subjects.tokens_to("g"), {"prefill", "decode"}),
        (subjects.gateway_events("g"), {"scheduler"}),
        (subjects.leader_events(), {"scheduler"}),
        (subjects.load("decode", "d"), {"decode", "supervisor"}),
        (subjects.control("d", "drain"), {"cli", "scheduler", "placer"}),
        ("$KV.leases_2000ms.scheduler.m", {"scheduler"}),
        ("$JS.API.STREAM.DELETE.KV_leases_2000ms", set()),
        ("_INBOX_gateway.0.1", set()),
    ],
)
def test_only_those_speak_who_must(subject: str, speakers: set[str]) -> None:
    assert who("publish", subject) == speakers


@pytest.mark.parametrize(
    ("subject", "hearers"),
    [
        (subjects.requests("m"), {"scheduler"}),
        (subjects.worker("decode", "d", "start"), {"decode"}),
        (subjects.tokens_to("g"), {"gateway"}),
        (subjects.load("decode", "d"), set(USERS)),
        (subjects.control("d", "drain"), set(SERVICES)),
    ],
)
def test_only_those_listen_who_must(subject: str, hearers: set[str]) -> None:
    assert who("subscribe", subject) == hearers


def test_nobody_may_say_or_hear_everything() -> None:
    for user in users().values():
        assert not any(pattern.startswith((">", "*")) for pattern in user.publish + user.subscribe)


def test_the_time_to_live_of_the_leader_lease_chooses_the_bucket() -> None:
    scheduler = nats_users(lambda _: "x", leader_lease_ttl_s=5.0)["scheduler"]
    assert "$KV.leases_5000ms.scheduler.*" in scheduler.publish
    assert not any("2000ms" in pattern for pattern in scheduler.publish)


def test_the_deployed_configuration_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert permissions.main(["--check", str(ROOT / "deploy" / "nats.conf")]) == 0
    assert permissions.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"password: ${password_variable(name)}\n" in text for name in USERS)


def test_a_stale_configuration_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "nats.conf"
    stale.write_text("port: 1\n")
    assert permissions.main(["--check", str(stale)]) == 1
    assert str(stale) in capsys.readouterr().err
