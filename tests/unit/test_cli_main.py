"""The command line itself: options, their variables, and what is refused before anything starts."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import cli.bus
import cli.up
from cli.errors import CommandFailed
from cli.host import check_ports, find_hardware
from cli.main import app, main
from cli.models import resolve_model
from cli.state import SuiteState, running_suites, write_state
from cli.up import UpRequest
from shared.config import BUNDLED_MODEL
from shared.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[UpRequest]:
    """What ``banyan up`` would have started, had it been run to the end."""
    found: list[UpRequest] = []

    def note(request: UpRequest) -> int:
        found.append(request)
        return 0

    monkeypatch.setattr(cli.up, "run_up", note)
    return found


def run(*arguments: str, **environ: str) -> Any:
    return CliRunner().invoke(app, arguments, env=environ)


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys, cli.main\n"
        "heavy = ('asyncio', 'httpx', 'huggingface_hub', 'msgspec', 'nats', 'pydantic', 'torch')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


def test_the_version_is_that_of_the_project() -> None:
    assert run("--version").stdout.startswith("banyan 0.")


def test_a_plain_up_is_one_of_each_service_with_the_bundled_model(
    requests: list[UpRequest],
) -> None:
    assert run("up").exit_code == 0
    options = requests[0].suite
    assert options.model_dir == BUNDLED_MODEL
    assert options.served_model_name == "tiny-chat"
    assert (options.host, options.port) == ("127.0.0.1", 8000)
    assert set(options.counts.values()) == {1}


def test_every_option_of_up_is_a_variable_too(requests: list[UpRequest], tmp_path: Path) -> None:
    environ = {
        "BANYAN_MODEL": str(BUNDLED_MODEL),
        "BANYAN_SERVED_MODEL_NAME": "other",
        "BANYAN_DTYPE": "fp32",
        "BANYAN_MAX_MODEL_LEN": "512",
        "BANYAN_PREFILL": "2",
        "BANYAN_DECODE": "3",
        "BANYAN_KVSTORE": "0",
        "BANYAN_SCHEDULER": "2",
        "BANYAN_GATEWAY": "2",
        "BANYAN_PREDICTOR": "0",
        "BANYAN_PLACER": "0",
        "BANYAN_DEVICE": "cpu",
        "BANYAN_MEMORY_FRACTION": "0.25",
        "BANYAN_POLICY": "fifo",
        "BANYAN_HOST": "0.0.0.0",
        "BANYAN_PORT": "9000",
        "BANYAN_TRANSPORT": "tcp",
        "BANYAN_JSON_LOGS": "1",
        "BANYAN_LOG_DIR": str(tmp_path),
        "BANYAN_READY_FILE": str(tmp_path / "ready.json"),
    }
    arguments = []
    for name, value in environ.items():
        option = "--" + name.removeprefix("BANYAN_").lower().replace("_", "-")
        arguments += [option] if option == "--json-logs" else [option, value]
    assert run("up", **environ).exit_code == 0
    assert run("up", *arguments).exit_code == 0
    assert run("up", "--port", "9001", **environ).exit_code == 0
    by_variable, by_option, by_both = requests
    assert by_variable == by_option
    assert by_both.suite.port == 9001
    assert by_variable.suite.counts["decode"] == 3
    assert by_variable.suite.memory_fraction == 0.25
    assert by_variable.suite.json_logs
    assert by_variable.ready_file == tmp_path / "ready.json"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--tp", "2"], "--tp"),
        (["--dtype", "fp16"], "--dtype"),
        (["--memory-fraction", "1.5"], "--memory-fraction"),
        (["--port", "70000"], "--port"),
        (["--gateway", "0"], "--gateway"),
        (["--decode", "many"], "--decode"),
    ],
)
def test_a_wrong_option_is_named(
    requests: list[UpRequest], arguments: list[str], culprit: str
) -> None:
    result = run("up", *arguments)
    assert result.exit_code == 2
    assert culprit in result.stderr
    assert requests == []


def test_a_policy_that_is_none_is_refused_with_those_that_are() -> None:
    result = run("up", "--policy", "lifo")
    assert isinstance(result.exception, ConfigError)
    assert "lifo" in str(result.exception) and "fifo" in str(result.exception)


def test_what_two_commands_share_is_the_same_option() -> None:
    shared = ("--model", "--dtype", "--quantization", "--kv-cache-dtype", "--device")
    for name in shared:
        up, profile = (option_of(command, name) for command in ("up", "profile"))
        assert (up.help, up.envvar, up.default) == (profile.help, profile.envvar, profile.default)


def option_of(command: str, name: str) -> Any:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return next(param for param in found.params if name in param.opts)


def test_a_limit_of_waiting_needs_waiting() -> None:
    result = run("drain", "decode-0", "--timeout-s", "3")
    assert result.exit_code == 2
    assert "--wait" in result.stderr


def test_json_needs_a_message() -> None:
    result = run("chat", "--json")
    assert result.exit_code == 2
    assert "-m" in result.stderr


@pytest.mark.parametrize("command", [["status"], ["drain", "decode-0"]])
def test_an_error_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["banyan", *command])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no suite runs here")
    assert error.count("\n") == 1


def test_a_bus_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.bus, "CONNECT_TIMEOUT_S", 0.2)
    result = run("status", "--nats-url", "127.0.0.1:1")
    assert isinstance(result.exception, CommandFailed)
    assert "nats://127.0.0.1:1 does not answer" in str(result.exception)
    result = run("status", BANYAN_NATS_URL="http://127.0.0.1:1")
    assert "--nats-url" in str(result.exception)


def test_without_a_nats_server_the_user_is_told_where_to_get_one(tmp_path: Path) -> None:
    arguments = ("--port", str(free_port()), "--log-dir", str(tmp_path / "logs"))
    result = run("up", *arguments, BANYAN_NATS_SERVER=str(tmp_path / "none"))
    assert isinstance(result.exception, ConfigError)
    assert "BANYAN_NATS_SERVER" in str(result.exception)
    assert running_suites() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Completion


def completed(*words: str) -> list[str]:
    """What bash is offered for the last of ``words``."""
    environ = {
        **os.environ,
        "_BANYAN_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["banyan", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-m", "cli.main"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def state_of(port: int, **fields: Any) -> SuiteState:
    url = f"http://127.0.0.1:{port}"
    values: dict[str, Any] = {
        "pid": os.getpid(),
        "port": port,
        "url": url,
        "urls": (url,),
        "model": "tiny",
        "nats_url": "nats://127.0.0.1:1",
        "nats_user": "cli",
        "nats_password": "secret",
        "log_dir": "/tmp",
        "pids": {},
    }
    return SuiteState(**(values | fields))


def test_the_shell_completes_instances_and_suites() -> None:
    write_state(state_of(9000, pids={"decode-0-ab": 1, "decode-1-cd": 2, "nats-0-ef": 3}))
    assert completed("drain", "dec") == ["decode-0-ab", "decode-1-cd"]
    assert completed("drain", "n") == []
    assert completed("status", "--url", "") == ["http://127.0.0.1:9000"]
    assert completed("up", "--policy", "fi") == ["fifo"]
    assert completed("dr") == ["drain"]


def test_without_a_suite_there_is_nothing_to_complete() -> None:
    assert completed("drain", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_how_to_ask(shell: str) -> None:
    command = [sys.executable, "-m", "cli.main"]
    environ = {**os.environ, "_BANYAN_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert "_BANYAN_COMPLETE" in done.stdout


# Chat


def test_a_suite_that_still_starts_is_not_talked_to_yet() -> None:
    write_state(state_of(9000, is_ready=False))
    result = run("chat", "-m", "hi")
    assert isinstance(result.exception, CommandFailed)
    assert "still starts" in str(result.exception)


# Models


def model_dir(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return path


def test_without_a_name_the_bundled_model_is_served() -> None:
    assert resolve_model(None).directory == BUNDLED_MODEL


def test_a_directory_is_served_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dir(tmp_path / "my-model", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for spelling in (str(directory), "my-model", "./my-model/"):
        found = resolve_model(spelling)
        assert (found.directory, found.name) == (directory, "my-model")


@pytest.mark.parametrize(
    ("files", "says"), [((), "config.json"), (("config.json",), "safetensors")]
)
def test_a_directory_without_a_model_is_refused(
    tmp_path: Path, files: tuple[str, ...], says: str
) -> None:
    with pytest.raises(CommandFailed, match=says):
        resolve_model(str(model_dir(tmp_path / "m", *files)))


def test_weights_that_git_lfs_has_not_fetched_are_told_so(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "m", "config.json")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(CommandFailed, match="git lfs pull"):
        resolve_model(str(directory))


@pytest.mark.parametrize("name", ["./no-such", "/no/such", "a/b/c", "~no-such-user/m"])
def test_a_path_that_is_none_is_no_hub_id(name: str) -> None:
    with pytest.raises(CommandFailed, match="neither a directory nor"):
        resolve_model(name)


def test_offline_a_hub_id_that_is_not_in_the_cache_is_told_so(tmp_path: Path) -> None:
    program = (
        "from cli.models import resolve_model\n"
        "from cli.errors import CommandFailed\n"
        "try:\n    resolve_model('some/model')\n"
        "except CommandFailed as error:\n    print(error)"
    )
    environ = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert "some/model" in done.stdout
    assert "cannot be reached" in done.stdout
    assert "give a directory" in done.stdout
    assert done.stdout.count("\n") == 1


# The machine


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        yield port


def test_a_port_in_use_is_found_before_anything_is_started(taken_port: int, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=rf"{taken_port}.*--port"):
        check_ports("127.0.0.1", [taken_port])
    result = run("up", "--port", str(taken_port), "--log-dir", str(tmp_path / "logs"))
    assert isinstance(result.exception, CommandFailed)
    assert not (tmp_path / "logs").exists()


def test_a_port_in_use_by_another_suite_says_by_which(taken_port: int) -> None:
    write_state(state_of(taken_port))
    with pytest.raises(CommandFailed, match=rf"another `banyan up` \(pid {os.getpid()}\)"):
        check_ports("127.0.0.1", [taken_port])


def test_a_port_of_a_suite_that_still_starts_is_taken_too() -> None:
    write_state(state_of(9000, urls=("http://127.0.0.1:9000", "http://127.0.0.1:9001")))
    with pytest.raises(CommandFailed, match=r"9001 .*another `banyan up`"):
        check_ports("127.0.0.1", [9001])


def test_a_port_that_would_do_is_named(taken_port: int) -> None:
    with pytest.raises(CommandFailed, match=r"--port \d+$") as failed:
        check_ports("127.0.0.1", [taken_port])
    named = int(str(failed.value).rsplit(" ", 1)[1])
    assert named != taken_port
    check_ports("127.0.0.1", [named])


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(CommandFailed, match=rf"{re.escape(host)}.*--host"):
        check_ports(host, [8000])


def test_a_free_port_is_free_afterwards(taken_port: int) -> None:
    free = free_port()
    check_ports("127.0.0.1", [free])
    check_ports("127.0.0.1", [free])


def test_on_the_cpu_no_gpu_is_looked_for() -> None:
    hardware = find_hardware("cpu")
    assert hardware.num_cores >= 1
    assert hardware.cuda_devices == ()
