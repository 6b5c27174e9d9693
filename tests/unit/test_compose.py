"""The compose files, the Dockerfile and docs/deployment.md fit the services and each other.

That the suite runs in containers is tried by tests/e2e/compose.sh, which needs a Docker engine.
"""

import importlib
import re
import runpy
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shared.bus.permissions import SERVICES, USERS, password_variable
from shared.config import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
SERVICE_DIRS = sorted(path.parent.name for path in (ROOT / "services").glob("*/__main__.py"))
DATA_PLANE = ("prefill", "decode", "kvstore")
WORKERS = ("prefill", "decode")
VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")
NOT_OURS = {"BANYAN_GPUS", "BANYAN_WORKERS_PER_GPU"}
"""Variables of a service's container that are read by something else than its settings."""


@dataclass
class Stage:
    """A stage of the Dockerfile: its instructions, those of the stages below it first."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


SCRIPT = runpy.run_path(str(ROOT / "tests/e2e/images/compose_v1.py"))


def load(name: str) -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    loaded: dict[str, Any] = yaml.load((ROOT / name).read_text(), Loader=SCRIPT["Loader"])
    return loaded


def stages() -> dict[str, Stage]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            below = found.get(base)
            current = Stage(base, list(below.instructions) if below else [])
            found[name] = current
        elif current is not None:
            current.instructions.append((instruction, " ".join(arguments.split())))
    return found


def last(stage: Stage, instruction: str) -> str | None:
    return next((a for i, a in reversed(stage.instructions) if i == instruction), None)


def interpolated(value: object, given: dict[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        if given.get(name):
            return given[name]
        assert operator is None or "?" not in operator, f"{name} is not set: {word}"
        return word or ""

    return VARIABLE.sub(replace, str(value))


def merged(service: str, *, is_cpu: bool) -> dict[str, Any]:
    """The environment of a service as one of the two variants has it."""
    environment = dict(load("docker-compose.yml")["services"][service]["environment"])
    if is_cpu:
        override = load("docker-compose.cpu.yml")["services"].get(service, {})
        environment |= override.get("environment", {})
    return environment


def settings_of(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"services.{service}.config")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceSettings)
        and value.__dict__.get("service") == service
    )


COMPOSE = load("docker-compose.yml")["services"]
STAGES = stages()
SECRETS = {password_variable(user) for user in USERS} | {"BANYAN_POSTGRES_PASSWORD"}


def test_every_service_is_there() -> None:
    assert sorted(SERVICES) == SERVICE_DIRS
    for name in SERVICE_DIRS:
        assert COMPOSE[name]["build"]["target"] == name
        assert name in STAGES


@pytest.mark.parametrize("name", SERVICE_DIRS)
def test_an_image_runs_its_service_as_nobody_of_note(name: str) -> None:
    stage = STAGES[name]
    assert last(stage, "USER") == "10001:10001"
    assert last(stage, "CMD") == f'["python", "-m", "services.{name}"]'
    assert "deploy/healthcheck.py" in (last(stage, "HEALTHCHECK") or "")
    assert ("COPY", f"--from=code /out/{name} /opt/banyan") in stage.instructions
    environment = " ".join(a for i, a in stage.instructions if i == "ENV")
    assert "PYTHONDONTWRITEBYTECODE=1" in environment


@pytest.mark.parametrize("name", [*SERVICE_DIRS, "cli"])
def test_an_image_has_the_packages_of_its_extra(name: str) -> None:
    extra = "worker" if name in WORKERS else name
    installed = [
        re.search(r"'\.\[([^]]+)\]'", arguments)
        for instruction, arguments in STAGES[f"packages-{extra}"].instructions
        if instruction == "RUN"
    ]
    names = {part for match in installed if match for part in match.group(1).split(",")}
    expected = {extra} | ({"ucx"} if name in DATA_PLANE else set())
    assert expected <= names
    assert names - expected <= {"kvstore"}  # a worker's are built on those of the store
    copies = [a for i, a in STAGES[name].instructions if i == "COPY"]
    assert f"--from=packages-{extra} /opt/venv /opt/venv" in copies


def test_no_image_is_made_of_the_one_that_builds() -> None:
    for name in [*SERVICE_DIRS, "cli"]:
        base = name
        while base in STAGES:
            base = STAGES[base].base
        assert base in ("${BASE}", "${WORKER_BASE}")


def test_the_gateway_installs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], "banyan[gateway]"]
    for name in needed:  # extras of our own are looked into when their turn comes
        if match := re.match(r"banyan\[(\w+)\]", name):
            needed += project["optional-dependencies"][match.group(1)]
        assert not re.match(r"(torch|transformers|numpy)\b", name)
    assert any(name.startswith("fastapi") for name in needed)


def test_packages_are_installed_before_code_is_copied() -> None:
    """So that a change of code installs nothing anew."""
    for name, stage in STAGES.items():
        if name.startswith("packages"):
            copied = [a for i, a in stage.instructions if i == "COPY"]
            assert copied == ["pyproject.toml constraints.txt LICENSE ./"]


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for stage in STAGES.values():
        for instruction, arguments in stage.instructions:
            if instruction == "COPY" and not arguments.startswith("--from"):
                for source in shlex.split(arguments)[:-1]:
                    assert (ROOT / source).exists()
                    assert any(source == a or source.startswith(f"{a}/") for a in allowed), source


@pytest.mark.parametrize("name", [*SERVICE_DIRS, "proxy", "nats", "postgres", "fabric"])
def test_a_container_can_do_little_and_is_restarted(name: str) -> None:
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICE_DIRS)
def test_a_service_waits_for_nats_and_has_time_to_drain(name: str) -> None:
    service = COMPOSE[name]
    assert service["depends_on"]["nats"] == {"condition": "service_healthy"}
    grace_s = int(interpolated(service["stop_grace_period"], {}).removesuffix("s"))
    assert grace_s > int(interpolated(service["environment"]["BANYAN_DRAIN_TIMEOUT_S"], {}))


@pytest.mark.parametrize("name", SERVICE_DIRS)
def test_a_service_is_its_own_user_of_nats(name: str) -> None:
    environment = COMPOSE[name]["environment"]
    assert environment["BANYAN_NATS_USER"] == name
    assert environment["BANYAN_NATS_PASSWORD"].startswith(f"${{{password_variable(name)}:?")
    others = SECRETS - {password_variable(name)} - {"BANYAN_POSTGRES_PASSWORD"}
    assert not [other for other in others if f"{{{other}" in str(environment)]


def test_nats_knows_every_password_and_the_permissions() -> None:
    nats = COMPOSE["nats"]
    for user in USERS:
        variable = password_variable(user)
        assert nats["environment"][variable].startswith(f"${{{variable}:?")
    assert "./deploy/nats.conf:/etc/banyan/nats.conf:ro" in nats["volumes"]
    assert nats["healthcheck"] and COMPOSE["postgres"]["healthcheck"]


def test_no_secret_has_a_value_in_the_files() -> None:
    for name, service in COMPOSE.items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|API_KEY|TOKEN$", key):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]+|:-)\}", value), f"{name}: {key}"
            address = re.search(r"://([^/@]*)@", str(value))
            if address:
                assert re.fullmatch(r"\w+:\$\{\w+:\?[^}]+\}", address.group(1)), f"{name}: {key}"


def test_secrets_are_required_and_all_of_them_made() -> None:
    required = {
        match.group(1)
        for match in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text())
        if match.group(2) and "?" in match.group(2)
    }
    made = set(re.findall(r"BANYAN_\w+_PASSWORD\w*", (ROOT / "deploy/secrets.sh").read_text()))
    assert required == made == SECRETS
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("is_cpu", [False, True], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", SERVICE_DIRS)
def test_a_service_accepts_what_it_is_told(
    name: str, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict.fromkeys(SECRETS, "p0")
    for key, value in merged(name, is_cpu=is_cpu).items():
        text = interpolated(value, given).replace("/models/", f"{ROOT}/models/")
        monkeypatch.setenv(key, text)
    settings = settings_of(name).load()
    assert settings.served_model_name == "tiny-chat"
    assert settings.nats_user == name
    known = set(ServiceSettings.model_fields)
    for key in merged(name, is_cpu=is_cpu):
        if key.startswith("BANYAN_") and not key.startswith(f"BANYAN_{name.upper()}_"):
            assert key in NOT_OURS or key.removeprefix("BANYAN_").lower() in known, key


def test_the_data_plane_shares_shared_memory_and_the_network_that_wakes_it() -> None:
    for name in DATA_PLANE:
        service, environment = COMPOSE[name], COMPOSE[name]["environment"]
        assert service["network_mode"] == "service:fabric"
        assert interpolated(service["ipc"], {}) == "host"
        # Whatever is on one network namespace twice must not want one port.
        assert environment["BANYAN_HEALTH_PORT"] == 0
        assert f"BANYAN_{name.upper()}_TRANSPORT_HOST" not in environment
    # UCX asks for the peer's process by its number: it is 1 everywhere.
    assert not [name for name in DATA_PLANE if COMPOSE[name].get("init")]


def devices(service: dict[str, Any]) -> list[dict[str, Any]]:
    found = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    return found or []


def test_prefill_and_decode_get_gpus_and_nobody_else() -> None:
    for name, service in COMPOSE.items():
        expected = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
        assert devices(service) == (expected if name in WORKERS else [])
    for name in WORKERS:
        environment = COMPOSE[name]["environment"]
        assert environment[f"BANYAN_{name.upper()}_DEVICE"] == "cuda"
        assert "gpus:/run/banyan/gpus" in COMPOSE[name]["volumes"]


def test_without_a_gpu_none_is_asked_for() -> None:
    # Compose looks for `!reset` where it stands: behind an alias it does nothing.
    text = (ROOT / "docker-compose.cpu.yml").read_text()
    assert text.count("devices: !reset []") == len(WORKERS)
    assert "!reset" not in text.partition("services:")[0]
    base = SCRIPT["plain"](load("docker-compose.yml"))
    override = SCRIPT["plain"](load("docker-compose.cpu.yml"))
    assert set(override["services"]) == set(WORKERS)
    SCRIPT["without_resets"](base, override)
    for name in WORKERS:
        assert devices(base["services"][name]) == devices(override["services"][name]) == []
        environment = merged(name, is_cpu=True)
        assert environment[f"BANYAN_{name.upper()}_DEVICE"] == "cpu"
        assert environment["BANYAN_GPUS"] == ""


def test_only_the_proxy_is_reached_from_outside_and_only_from_this_host_by_default() -> None:
    assert [name for name, service in COMPOSE.items() if "ports" in service] == ["proxy"]
    assert [interpolated(port, {}) for port in COMPOSE["proxy"]["ports"]] == ["127.0.0.1:8000:8000"]
    networks = load("docker-compose.yml")["networks"]
    assert [name for name, network in networks.items() if not network.get("internal")] == ["front"]
    assert "server-template" in (ROOT / "deploy/haproxy.cfg").read_text()


def test_every_variable_of_the_files_is_documented() -> None:
    page = (ROOT / "docs/deployment.md").read_text()
    for name in ("docker-compose.yml", "docker-compose.cpu.yml"):
        for match in VARIABLE.finditer((ROOT / name).read_text()):
            variable = match.group(1)
            assert variable in SECRETS or f"`{variable}`" in page, f"{name}: {variable}"
