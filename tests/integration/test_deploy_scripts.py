"""The scripts of deploy/: the health check, the claims on GPUs, the passwords."""

import asyncio
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.health import Health, HealthServer, Phase
from shared.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TIMEOUT_S = 20

# Health check


async def ask(port_file: Path, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(DEPLOY / "healthcheck.py"), *arguments),
        env={"BANYAN_HEALTH_PORT_FILE": str(port_file)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_container_is_healthy_when_its_service_is_ready(tmp_path: Path) -> None:
    health, port_file = Health(), tmp_path / "health.port"
    server = HealthServer(health, Metrics(process=True))
    assert (await ask(port_file))[0] == 1  # nothing has started yet
    port_file.write_text(f"{await server.start('127.0.0.1', 0)}\n")
    try:
        code, output = await ask(port_file)
        assert code == 1 and "starting" in output
        health.phase = Phase.READY
        assert (await ask(port_file))[0] == 0
        health.add_readiness_check("bus", lambda: "not connected to the bus")
        code, output = await ask(port_file)
        assert code == 1 and "not connected to the bus" in output
        assert (await ask(port_file, "/health/live"))[0] == 0
        code, output = await ask(port_file, "/metrics")
        assert code == 0 and "process_cpu_seconds_total" in output
    finally:
        await server.close()
    code, output = await ask(port_file)
    assert code == 1 and "not healthy" in output


# Claims on GPUs

SHOW = (
    "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), "
    "os.environ.get('BANYAN_DECODE_MEMORY_FRACTION'), os.getpid(), flush=True); input()"
)


@contextmanager
def worker(locks: Path, **variables: str) -> Iterator[tuple[str, str] | str]:
    """A command that runs while the block does: its GPU and share; or why it does not run."""
    environment = {**os.environ, "BANYAN_GPU_LOCKS": str(locks), **variables}
    process = subprocess.Popen(
        [sys.executable, str(DEPLOY / "claim_gpu.py"), sys.executable, "-c", SHOW],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin and process.stdout and process.stderr
        words = process.stdout.readline().split()
        try:
            if words:
                assert int(words[2]) == process.pid  # the command has taken its place
                yield words[0], words[1]
            else:
                yield process.stderr.read()
        finally:
            process.kill()


def test_replicas_take_different_gpus(tmp_path: Path) -> None:
    two = {"BANYAN_GPUS": "GPU-a, GPU-b"}
    with worker(tmp_path, **two) as first, worker(tmp_path, **two) as second:
        assert {first, second} == {("GPU-a", "0.9000"), ("GPU-b", "0.9000")}
        with worker(tmp_path, **two) as third:
            assert "all 2 GPUs have 1 workers" in third
    with worker(tmp_path, **two) as again:  # killed, they hold nothing any more
        assert again == ("GPU-a", "0.9000")


def test_gpus_are_shared_by_as_many_as_may(tmp_path: Path) -> None:
    shared = {"BANYAN_GPUS": "0,1", "BANYAN_WORKERS_PER_GPU": "2"}
    with (
        worker(tmp_path, **shared) as first,
        worker(tmp_path, **shared) as second,
        worker(tmp_path, **shared) as third,
    ):
        assert [first, second, third] == [("0", "0.4500"), ("1", "0.4500"), ("0", "0.4500")]


def test_a_share_that_is_given_stays(tmp_path: Path) -> None:
    with worker(tmp_path, BANYAN_GPUS="0", BANYAN_DECODE_MEMORY_FRACTION="0.3") as found:
        assert found == ("0", "0.3")


def test_without_gpus_the_command_just_runs(tmp_path: Path) -> None:
    variables = {"BANYAN_GPUS": "", "CUDA_VISIBLE_DEVICES": "7"}
    with worker(tmp_path, **variables) as found:
        assert found == ("7", "None")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_wrong_number_of_workers_is_named(tmp_path: Path, number: str) -> None:
    with worker(tmp_path, BANYAN_GPUS="0", BANYAN_WORKERS_PER_GPU=number) as found:
        assert f"BANYAN_WORKERS_PER_GPU={number}" in found


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with worker(tmp_path / "absent", BANYAN_GPUS="0") as found:
        assert "BANYAN_GPUS=0" in found and "absent" in found


# Passwords


def make_secrets(file: Path) -> dict[str, str]:
    subprocess.run([DEPLOY / "secrets.sh", file], check=True, timeout=TIMEOUT_S)
    lines = [line for line in file.read_text().splitlines() if line]
    return dict(line.split("=", 1) for line in lines)


def test_passwords_are_random_and_only_the_owners_to_read(tmp_path: Path) -> None:
    one, other = make_secrets(tmp_path / "one"), make_secrets(tmp_path / "other")
    assert set(one) == set(other)
    assert not set(one.values()) & set(other.values())
    assert len(set(one.values())) == len(one)
    assert all(re.fullmatch(r"p[A-Za-z0-9]{32}", password) for password in one.values())
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


def test_passwords_and_settings_that_are_there_stay(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("BANYAN_MODEL=Qwen3-8B\nBANYAN_NATS_PASSWORD_CLI=mine")  # no end of line
    first = make_secrets(file)
    assert first["BANYAN_MODEL"] == "Qwen3-8B"
    assert first["BANYAN_NATS_PASSWORD_CLI"] == "mine"
    assert make_secrets(file) == first
