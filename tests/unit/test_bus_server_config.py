"""The text of nats.conf. That nats-server obeys it is tried in tests/integration."""

from pathlib import Path

import pytest

from shared.bus.nats import NatsBus
from shared.bus.server import NatsUser, PasswordFromEnv, lease_permissions, render_config
from shared.errors import ConfigError
from shared.messages.base import ErrorReply, MessageCodec
from tests.integration.bus_rig import Ping


def render(**users: NatsUser) -> str:
    return render_config(host="127.0.0.1", port=4222, store_dir=Path("/data/js"), users=users)


def test_without_users_there_is_no_authentication() -> None:
    assert render() == (
        'host: "127.0.0.1"\n'
        "port: 4222\n"
        "max_payload: 8388608\n"
        "jetstream {\n"
        '  store_dir: "/data/js"\n'
        "}\n"
    )


def test_a_user_may_do_what_is_named_and_listen_to_its_inbox() -> None:
    text = render(alice=NatsUser(password='s"3', publish=("a.>", "b"), subscribe=("c",)))
    assert '      password: "s\\"3"\n' in text
    assert '        publish: { allow: ["a.>", "b"] }\n' in text
    assert '        subscribe: { allow: ["c", "_INBOX_alice.>"] }\n' in text


def test_a_user_that_may_publish_nothing_is_denied_everything() -> None:
    assert '        publish: { deny: [">"] }\n' in render(mute=NatsUser(password="m"))


def test_a_password_can_come_from_the_environment() -> None:
    text = render(alice=NatsUser(password=PasswordFromEnv("ALICE_PASSWORD")))
    assert "      password: $ALICE_PASSWORD\n" in text
    with pytest.raises(ConfigError, match="environment variable"):
        PasswordFromEnv("A B")


def test_lease_permissions_name_the_bucket_and_the_keys() -> None:
    publish, subscribe = lease_permissions("leases_2000ms", ("workers.*",))
    assert "$KV.leases_2000ms.workers.*" in publish
    assert all("leases_2000ms" in subject for subject in publish)
    assert subscribe == ()


@pytest.mark.parametrize("name", ["", "a.b", "a b", "*"])
def test_a_name_that_cannot_be_part_of_a_subject_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name for a NATS user"):
        render(**{name: NatsUser(password="x")})
    with pytest.raises(ConfigError, match="not a name for a NATS user"):
        NatsBus(MessageCodec((ErrorReply,)), "nats://h:1", name="n", user=name, password="x")


@pytest.mark.parametrize("url", ["", "localhost:4222", "http://h:1", "nats://", "nats://h:x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a NATS server"):
        NatsBus(MessageCodec((ErrorReply,)), url, name="n")
    with pytest.raises(ConfigError, match="no NATS server"):
        NatsBus(MessageCodec((ErrorReply,)), [], name="n")


def test_a_codec_without_error_replies_is_refused() -> None:
    with pytest.raises(ValueError, match="ErrorReply"):
        NatsBus(MessageCodec((Ping,)), "nats://h:1", name="n")
