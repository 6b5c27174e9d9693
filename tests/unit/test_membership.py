"""Who is alive: judged by silence, and only by a judge who could hear."""

from shared.core.membership import Membership


def judged(members: Membership, *, until_s: float, since_s: float = 0.0) -> list[str]:
    """Tick every 0.1 s from ``since_s`` and collect who is declared dead."""
    dead: list[str] = []
    for tick in range(int(since_s * 10), int(until_s * 10) + 1):
        dead += members.expired(tick / 10)
    return dead


def test_silence_for_a_ttl_is_death() -> None:
    members = Membership(ttl_s=2.0)
    assert members.on_report("a", 1, 0.0) is True
    assert members.on_report("a", 2, 0.5) is False
    assert judged(members, until_s=2.5) == []
    assert judged(members, since_s=2.6, until_s=2.6) == ["a"]
    assert "a" not in members


def test_an_old_report_does_not_keep_an_instance_alive() -> None:
    members = Membership(ttl_s=2.0)
    members.on_report("a", 5, 0.0)
    assert members.on_report("a", 4, 1.9) is None
    assert judged(members, until_s=2.1) == ["a"]


def test_nobody_is_judged_for_a_ttl_after_a_reconnect() -> None:
    members = Membership(ttl_s=2.0)
    members.on_report("a", 1, 0.0)
    members.on_report("b", 1, 0.0)
    members.on_reconnect(5.0)
    members.on_report("b", 2, 5.2)
    assert judged(members, since_s=5.0, until_s=6.9) == []
    assert judged(members, since_s=7.0, until_s=7.1) == ["a"]


def test_a_judge_that_was_frozen_gives_everybody_a_ttl() -> None:
    members = Membership(ttl_s=2.0)
    members.on_report("a", 1, 0.0)
    assert judged(members, until_s=1.0) == []
    assert members.expired(11.0) == []  # ten seconds asleep: the reports wait unread
    members.on_report("a", 2, 11.01)
    assert judged(members, since_s=11.1, until_s=13.0) == []


def test_an_instance_that_left_may_come_back() -> None:
    members = Membership(ttl_s=2.0)
    members.on_report("a", 7, 0.0)
    assert members.remove("a")
    assert not members.remove("a")
    assert members.on_report("a", 8, 1.0) is True
