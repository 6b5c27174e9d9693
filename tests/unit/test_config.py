import json
import logging
from typing import ClassVar

import pytest
from pydantic import SecretStr, ValidationError, model_validator

from shared.config import ServiceSettings
from shared.errors import ConfigError
from shared.worker.config import WorkerSettings


class GreeterSettings(ServiceSettings):
    service: ClassVar[str] = "greeter"
    port: int = 8000
    greeting: str
    languages: tuple[str, ...] = ("en",)
    pin: SecretStr | None = None

    @model_validator(mode="after")
    def _polite(self) -> "GreeterSettings":
        if self.greeting == "oi":
            raise ValueError("the greeting must be polite")
        return self


@pytest.fixture(autouse=True)
def greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_GREETING", "hello")


def test_own_fields_are_read_with_the_service_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PORT", "81")
    monkeypatch.setenv("BANYAN_GREETER_LANGUAGES", '["en", "ta"]')
    settings = GreeterSettings.load()
    assert (settings.port, settings.greeting, settings.languages) == (81, "hello", ("en", "ta"))


def test_common_fields_are_shared_and_can_be_set_for_one_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BANYAN_NATS_URL", "nats://bus:4222")
    monkeypatch.setenv("BANYAN_LOG_LEVEL", "warning")
    monkeypatch.setenv("BANYAN_GREETER_LOG_LEVEL", "debug")
    settings = GreeterSettings.load()
    assert settings.nats_url == "nats://bus:4222"
    assert settings.log_level == "DEBUG"


def test_an_own_field_is_not_read_from_the_common_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_PORT", "81")
    assert GreeterSettings.load().port == 8000


def test_overrides_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PORT", "81")
    assert GreeterSettings.load(port=82).port == 82


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PORT", "")
    monkeypatch.setenv("BANYAN_LOG_LEVEL", "")
    assert GreeterSettings.load().port == 8000


def test_instances_are_named_apart_and_after_their_service() -> None:
    first, second = GreeterSettings.load(), GreeterSettings.load()
    assert first.instance.startswith("greeter-")
    assert first.instance != second.instance


@pytest.mark.parametrize(
    ("model", "name"),
    [("Org/Some-Model-1B", "Org/Some-Model-1B"), ("<dir>", "my-model")],
)
def test_the_served_name_follows_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, model: str, name: str
) -> None:
    if model == "<dir>":
        directory = tmp_path_factory.mktemp("models") / "my-model"
        directory.mkdir()
        model = f"{directory}/"
    monkeypatch.setenv("BANYAN_MODEL", model)
    assert GreeterSettings.load().served_model_name == name
    monkeypatch.setenv("BANYAN_SERVED_MODEL_NAME", "gpt-ours")
    assert GreeterSettings.load().served_model_name == "gpt-ours"


def test_the_default_model_is_the_bundled_one() -> None:
    assert GreeterSettings.load().served_model_name == "tiny-chat"


def test_a_bad_value_is_reported_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PORT", "eighty")
    monkeypatch.setenv("BANYAN_HEALTH_PORT", "70000")
    with pytest.raises(ConfigError) as caught:
        GreeterSettings.load()
    assert "BANYAN_GREETER_PORT='eighty': " in str(caught.value)
    assert "BANYAN_HEALTH_PORT='70000': " in str(caught.value)


def test_a_bad_override_is_reported_by_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PORT", "80")
    with pytest.raises(ConfigError, match=r"^port='eighty': "):
        GreeterSettings.load(port="eighty")
    with pytest.raises(ConfigError, match=r"^prot=80: "):
        GreeterSettings.load(prot=80)


def test_a_missing_value_is_reported_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BANYAN_GREETER_GREETING")
    with pytest.raises(ConfigError, match=r"^BANYAN_GREETER_GREETING is not set"):
        GreeterSettings.load()


def test_a_list_that_is_not_json_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_LANGUAGES", "en,ta")
    with pytest.raises(ConfigError, match=r"^BANYAN_GREETER_LANGUAGES='en,ta': not valid JSON"):
        GreeterSettings.load()


def test_a_bad_element_is_located_inside_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_LANGUAGES", '["en", 7]')
    with pytest.raises(ConfigError, match=r"BANYAN_GREETER_LANGUAGES=.*\(at 1\)"):
        GreeterSettings.load()


def test_a_rule_across_fields_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_GREETING", "oi")
    with pytest.raises(ConfigError, match=r"greeter settings: .*polite"):
        GreeterSettings.load()


def test_a_misspelt_variable_is_an_error_that_names_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BANYAN_GREETER_PROT", "81")
    with pytest.raises(ConfigError, match=r"BANYAN_GREETER_PROT='81'.*BANYAN_GREETER_PORT"):
        GreeterSettings.load()


def test_other_services_variables_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GATEWAY_PROT", "81")
    assert GreeterSettings.load().port == 8000


def test_secrets_never_show_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_GREETER_LANGUAGES", "[]")
    with pytest.raises(ConfigError) as caught:
        GreeterSettings.load(pin=["hunter2"])
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("BANYAN_GREETER_NATS_PASSWORT", "hunter2")
    with pytest.raises(ConfigError) as caught:
        GreeterSettings.load()
    assert "did you mean BANYAN_GREETER_NATS_PASSWORD?" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_effective_settings_are_logged_once_without_secrets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BANYAN_NATS_URL", "nats://me:hunter2@bus:4222")
    monkeypatch.setenv("BANYAN_NATS_PASSWORD", "hunter2")
    monkeypatch.setenv("BANYAN_GREETER_PIN", "hunter2")
    settings = GreeterSettings.load()
    with caplog.at_level(logging.INFO):
        settings.log_effective(logging.getLogger("test"))
    (record,) = caplog.records
    shown = vars(record)["settings"]
    assert shown["nats_url"] == "nats://**********@bus:4222"
    assert shown["port"] == 8000
    assert "hunter2" not in json.dumps(shown)
    assert settings.nats_password is not None
    assert settings.nats_password.get_secret_value() == "hunter2"


def test_settings_are_frozen() -> None:
    settings = GreeterSettings.load()
    with pytest.raises(ValidationError):
        settings.port = 1


def test_a_worker_takes_the_devices_that_its_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cpu", "cuda"):
        monkeypatch.setenv("BANYAN_WORKER_DEVICE", device)
        assert WorkerSettings.load().engine_config().device == device
    # Which GPU is meant says CUDA_VISIBLE_DEVICES.
    monkeypatch.setenv("BANYAN_WORKER_DEVICE", "cuda:1")
    with pytest.raises(ConfigError, match="BANYAN_WORKER_DEVICE"):
        WorkerSettings.load()
