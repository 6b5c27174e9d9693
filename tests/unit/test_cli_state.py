"""How commands find the suite that runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from cli.errors import CommandFailed
from cli.state import (
    SuiteState,
    find_suite,
    process_start,
    remove_state,
    running_suites,
    state_path,
    write_private,
    write_state,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def suite(port: int, pid: int | None = None) -> SuiteState:
    return SuiteState(
        pid=os.getpid() if pid is None else pid,
        port=port,
        url=f"http://127.0.0.1:{port}",
        urls=(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"),
        model="tiny",
        nats_url="nats://127.0.0.1:4222",
        nats_user="cli",
        nats_password="secret",
        log_dir="/tmp",
        pids={"decode-0-ab12": 7},
    )


def pid_of_the_dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_without_a_suite_there_is_none() -> None:
    assert find_suite(None) is None
    assert find_suite("http://127.0.0.1:8000") is None


def test_the_only_suite_is_meant_wherever_it_is() -> None:
    write_state(suite(9000))
    assert find_suite(None) == suite(9000)


def test_only_its_owner_may_read_the_password() -> None:
    path = write_state(suite(9000))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_of_several_suites_the_one_on_the_usual_port_is_meant() -> None:
    write_state(suite(9000))
    write_state(suite(8000))
    assert find_suite(None) == suite(8000)


def test_of_several_suites_on_other_ports_none_is_meant() -> None:
    write_state(suite(9000))
    write_state(suite(9100))
    with pytest.raises(CommandFailed, match=r"--url.*:9000.*:9100"):
        find_suite(None)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:9100", 9100),
        ("localhost:9101", 9100),
        ("http://some-name:9000/v1", 9000),
        ("http://127.0.0.1:9200", None),
        ("http://127.0.0.1", None),
    ],
)
def test_a_suite_is_found_by_any_of_its_gateways(url: str, port: int | None) -> None:
    write_state(suite(9000))
    write_state(suite(9100))
    found = find_suite(url)
    assert (found.port if found is not None else None) == port


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(CommandFailed, match="--url"):
        find_suite("http://127.0.0.1:eight")


def test_a_suite_that_died_is_forgotten() -> None:
    path = write_state(suite(9000, pid=pid_of_the_dead()))
    assert running_suites() == []
    assert not path.exists()


def test_a_later_process_with_the_number_of_a_suite_is_none() -> None:
    started = process_start(os.getpid())
    path = write_state(replace(suite(9000), pid_started=started))
    assert len(running_suites()) == 1
    write_state(replace(suite(9000), pid_started=f"{started}0"))
    assert running_suites() == []
    assert not path.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_two_processes_are_told_apart_by_their_start() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert process_start(other.pid) not in ("", process_start(os.getpid()))
        assert process_start(other.pid) == process_start(other.pid)
        other.communicate(b"\n")
    assert process_start(other.pid) == ""


def test_a_directory_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CommandFailed, match=r"current-9000\.json.*XDG_CACHE_HOME"):
        write_state(suite(9000))


def test_a_file_that_is_no_state_is_left_alone() -> None:
    write_state(suite(9000))
    state_path(9100).write_text("{}")
    assert running_suites() == [suite(9000)]
    assert state_path(9100).exists()


def test_a_suite_removes_its_own_state_only() -> None:
    former = suite(9000, pid=pid_of_the_dead())
    write_state(suite(9000))
    remove_state(former)
    assert find_suite(None) == suite(9000)
    remove_state(suite(9000))
    assert find_suite(None) is None


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ready.json"
    write_private(path, b"one")
    write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
