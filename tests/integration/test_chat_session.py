"""``banyan chat`` as a user sees it: a process at a terminal, a real gateway application."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.gateway_app import app_over, token_ids
from tests.scripted_generator import ScriptedGenerator, Step, tokens

pytest.importorskip("readline")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0
SLOW = "one two three four five six seven"
QUICK = "Here is all of it."
UP = b"\x1b[A"
CTRL_D = b"\x04"


@pytest.fixture
def gateway() -> Iterator[str]:
    """The address of a gateway whose first answer never ends; the others are whole."""
    first: list[Step] = [*tokens(token_ids(SLOW))[:-1], asyncio.Event()]
    answers = iter([first])
    generator = ScriptedGenerator(lambda _: next(answers, tokens(token_ids(QUICK))))
    config = uvicorn.Config(app_over(generator), log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.force_exit = server.should_exit = True
            thread.join(DEADLINE_S)


class Terminal:
    """A conversation in a terminal of its own."""

    def __init__(self, url: str, data_dir: Path) -> None:
        self._screen, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "chat", "--url", url],
            cwd=ROOT,
            env={**os.environ, "XDG_DATA_HOME": str(data_dir), "TERM": "xterm"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)

    def type(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def interrupt(self) -> None:
        """What Ctrl-C does to the process at a terminal."""
        self.process.send_signal(signal.SIGINT)

    def until(self, text: str) -> str:
        """Return what was shown up to ``text``, and no more."""
        shown = b""
        deadline_s = time.monotonic() + DEADLINE_S
        while text.encode() not in shown:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0 and select.select([self._screen], [], [], left_s)[0], shown
            shown += os.read(self._screen, 1)
        return shown.decode(errors="replace")

    def end(self) -> int:
        self.type(CTRL_D)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(gateway: str, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(gateway, tmp_path)
    yield terminal
    terminal.close()


def test_ctrl_c_ends_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.until("Talking to tiny")
    terminal.until("you> ")
    terminal.type(b"Count.\n")
    terminal.until("one two")
    terminal.interrupt()
    terminal.until("…")
    terminal.until("you> ")
    terminal.type(b"half a quest")
    terminal.until("half a quest")
    terminal.interrupt()
    terminal.until("you> ")
    terminal.type(b"All of it?\n")
    terminal.until(QUICK)
    terminal.until("you> ")
    terminal.type(b"/new\n")
    terminal.until("forgotten")
    terminal.until("you> ")
    assert terminal.end() == 0


def test_questions_are_remembered_for_the_next_time(gateway: str, tmp_path: Path) -> None:
    for question, remembered in ((b"Count.\n", ""), (b"All of it?\n", "Count.")):
        terminal = Terminal(gateway, tmp_path)
        try:
            terminal.until("you> ")
            terminal.type(UP)
            terminal.until(remembered)
            terminal.type(b"\x15" + question)  # Ctrl-U empties the line
            terminal.until("one two" if not remembered else QUICK)
            if not remembered:
                terminal.interrupt()
            terminal.until("you> ")
            assert terminal.end() == 0
        finally:
            terminal.close()
    history = tmp_path / "banyan" / "chat_history"
    assert "Count." in history.read_text() and "All" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_without_a_terminal_each_line_is_a_question(gateway: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "chat", "--url", gateway, "--max-tokens", "50"],
        cwd=ROOT,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        input="",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "banyan").exists()
