"""Settings of a service: frozen, read from the environment, checked at start.

A service subclasses ``ServiceSettings`` and names itself::

    class GatewaySettings(ServiceSettings):
        service: ClassVar[str] = "gateway"
        port: int = 8000                        # BANYAN_GATEWAY_PORT

    settings = GatewaySettings.load()

A field ``x`` is read from ``BANYAN_<SERVICE>_X``; the common fields of ``ServiceSettings`` also
from ``BANYAN_X``, which the service's own variable overrides. Lists and mappings are JSON. An
empty variable counts as unset. A variable with the service's prefix that no field has is an error,
because a misspelt setting would otherwise do nothing.
"""

import difflib
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from shared.errors import ConfigError

ENV_PREFIX = "BANYAN_"
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-chat"

_MASK = "**********"
_SECRET_NAME = re.compile(r"password|secret|token$|api_key|private_key", re.IGNORECASE)
_URL_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)


def _is_a_directory(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError("must be a directory (a Hub id is fetched by `banyan up` before)")
    return value


ModelDirectory = Annotated[str, AfterValidator(_is_a_directory)]
"""The model of a service that reads its files itself."""

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class ServiceSettings(BaseSettings):
    """What every service can be told. Subclasses set ``service`` and add their own fields."""

    service: ClassVar[str]
    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, extra="forbid", protected_namespaces=()
    )

    instance: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
    """Unique name of this process among all; ``<service>-<random>`` where none is given."""

    nats_url: str = "nats://127.0.0.1:4222"
    nats_user: str | None = None
    nats_password: SecretStr | None = None

    model: str = str(BUNDLED_MODEL)
    """A directory with a model in Hugging Face form, or a Hub id."""
    served_model_name: str = Field(min_length=1)
    """The name clients use; by default the model's directory name, or its Hub id."""

    database_url: str | None = None
    """``postgresql://user:password@host/name`` or ``sqlite:////file``, for the services that keep
    something; without one it is ``banyan.db`` among the user's data (``shared.db.url``)."""

    log_level: LogLevel = "INFO"
    log_json: bool | None = None
    """JSON logs yes or no; unset means JSON unless stderr is a terminal."""

    health_host: str = "127.0.0.1"
    health_port: int = Field(default=0, ge=0, le=65535)
    """Port of ``/health/*`` and ``/metrics``; 0 takes a free one."""
    health_port_file: Path | None = None
    """Where to write the port that was taken, for whoever started this process."""

    drain_timeout_s: float = Field(default=30.0, ge=0)
    """How long in-flight work may go on after SIGTERM before it is handed over or dropped."""
    parent_pid: int | None = Field(default=None, gt=0)
    """Die with this parent process (Linux); set by a supervisor, not by people."""

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read and check the settings; ``overrides`` win over the environment.

        Raises ``ConfigError`` naming every offending variable and its value, secrets masked.
        """
        _refuse_unknown_variables(cls)
        try:
            return cls(**overrides)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False)
            lines = [_describe(cls, detail, overrides) for detail in details]
            raise ConfigError("; ".join(lines)) from None
        except SettingsError as error:
            raise ConfigError(_describe_unparsable(cls, error)) from error

    @classmethod
    def env_name(cls, field: str) -> str:
        """The variable a field is read from (the common fields' shared one: ``BANYAN_<FIELD>``)."""
        prefix = ENV_PREFIX if field in ServiceSettings.model_fields else _service_prefix(cls)
        return prefix + field.upper()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Overrides, then the service's own variables, then the common ones; no files."""
        return (
            init_settings,
            EnvSettingsSource(settings_cls, env_prefix=_service_prefix(cls)),
            _CommonEnvironment(settings_cls, env_prefix=ENV_PREFIX),
        )

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_unnamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        if not data.get("instance"):
            data["instance"] = f"{cls.service}-{secrets.token_hex(4)}"
        if not data.get("served_model_name"):
            model = str(data.get("model") or BUNDLED_MODEL)
            data["served_model_name"] = Path(model).name if Path(model).is_dir() else model
        return data

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    def effective(self) -> dict[str, Any]:
        """Every setting as it holds, in JSON types, with secrets and URL credentials masked."""
        return {key: _masked(key, value) for key, value in self.model_dump(mode="json").items()}

    def log_effective(self, logger: logging.Logger) -> None:
        """Write the effective settings as one record; called once, at start."""
        logger.info("effective settings", extra={"settings": self.effective()})


class _CommonEnvironment(EnvSettingsSource):
    """Reads ``BANYAN_X``, for the common fields only."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        if field_name not in ServiceSettings.model_fields:
            return None, field_name, False
        return super().get_field_value(field, field_name)


def _service_prefix(settings_type: type[ServiceSettings]) -> str:
    return f"{ENV_PREFIX}{settings_type.service.upper()}_"


def _variable_in_use(settings_type: type[ServiceSettings], field: str) -> str | None:
    """The environment variable that set ``field``, ``None`` if none did."""
    own = _service_prefix(settings_type) + field.upper()
    present = {key.upper(): key for key, value in os.environ.items() if value}
    for name in (own, settings_type.env_name(field)):
        if name in present:
            return present[name]
    return None


def _masked(key: str, value: Any) -> Any:
    if value is None:
        return None
    if _SECRET_NAME.search(key):
        return _MASK
    return _URL_USERINFO.sub(rf"\g<scheme>{_MASK}@", value) if isinstance(value, str) else value


def _refuse_unknown_variables(settings_type: type[ServiceSettings]) -> None:
    prefix = _service_prefix(settings_type)
    known = [prefix + field.upper() for field in settings_type.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            value = _masked(" ".join([name, *close]), os.environ[name])
            raise ConfigError(f"{name}={value!r}: there is no such setting{hint}")


def _describe(
    settings_type: type[ServiceSettings], detail: ErrorDetails, overrides: dict[str, Any]
) -> str:
    """One validation error as ``VARIABLE=value: what is wrong``."""
    location = [str(part) for part in detail["loc"]]
    if not location:
        return f"{settings_type.service} settings: {detail['msg']}"
    field, *inner = location
    variable = _variable_in_use(settings_type, field)
    if detail["type"] == "missing" and variable is None and field not in overrides:
        return f"{settings_type.env_name(field)} is not set and has no default"
    if field in overrides or variable is None:
        name, value = field, detail["input"]
    else:
        name, value = variable, os.environ[variable]
    where = f" (at {'.'.join(inner)})" if inner else ""
    shown = _MASK if _is_secret(settings_type, field) else _masked(field, value)
    return f"{name}={shown!r}: {detail['msg']}{where}"


def _describe_unparsable(settings_type: type[ServiceSettings], error: SettingsError) -> str:
    """A list or mapping whose variable is not JSON."""
    for field in settings_type.model_fields:
        if f'"{field}"' in str(error):
            variable = _variable_in_use(settings_type, field) or settings_type.env_name(field)
            value = _masked(field, os.environ.get(variable, ""))
            return f"{variable}={value!r}: not valid JSON"
    return str(error)


def _is_secret(settings_type: type[ServiceSettings], field: str) -> bool:
    info = settings_type.model_fields.get(field)
    return info is not None and "SecretStr" in str(info.annotation)
