"""What ``banyan up`` shows at a terminal while it starts, and why it does not start."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.suite import ROOT, free_port

pytestmark = pytest.mark.timeout(240)

START_S = 120.0


def banyan(*arguments: str, cache_dir: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache_dir), **environ},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def shown_until(screen: int, text: str) -> str:
    shown = b""
    deadline_s = time.monotonic() + START_S
    while text.encode() not in shown:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0 and select.select([screen], [], [], left_s)[0], shown
        shown += os.read(screen, 4096)
    return shown.decode(errors="replace")


def test_loading_is_shown_and_other_commands_see_a_suite_that_starts(tmp_path: Path) -> None:
    port = free_port()
    screen, inner = os.openpty()
    command = [sys.executable, "-m", "cli.main", "up", "--port", str(port), "--dtype", "fp32"]
    up = subprocess.Popen(
        [*command, "--log-dir", str(tmp_path / "logs")],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "300"},
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    try:
        shown = shown_until(screen, "nats-0✓")
        early = banyan("chat", "-m", "hi", cache_dir=tmp_path)
        shown += shown_until(screen, "is ready at")
        assert early.returncode == 1 and "still starts" in early.stderr
        assert re.search(r"(prefill|decode)-0 [a-zA-Z0-9 ]+ \d+%", shown)
        state = json.loads(banyan("status", "--json", cache_dir=tmp_path).stdout)
        assert len(state["instances"]) == 7
        table = banyan("status", cache_dir=tmp_path).stdout
        assert re.search(r"tiny-chat: scheduler-0-\w+ leads, epoch \d+", table)
        named = json.loads((tmp_path / "banyan" / f"current-{port}.json").read_text())
        elsewhere = {
            "BANYAN_NATS_URL": named["nats_url"],
            "BANYAN_NATS_PASSWORD": named["nats_password"],
        }
        remote = banyan("status", "--json", cache_dir=tmp_path / "other", **elsewhere)
        assert json.loads(remote.stdout)["leader"] == state["leader"]
        assert named["nats_password"] not in remote.stdout
        up.send_signal(signal.SIGINT)
        assert up.wait(START_S) == 0
    finally:
        up.kill()
        up.wait()
        os.close(screen)


def test_a_model_that_is_not_served_is_told_at_once_with_the_reason(
    tmp_path: Path, model_dir: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    log_dir = tmp_path / "logs"
    done = banyan(
        *("up", "--model", str(directory), "--port", str(free_port()), "--log-dir", str(log_dir)),
        cache_dir=tmp_path,
    )
    assert done.returncode == 1
    assert re.search(r"(prefill|decode)-0 does not start: t5 is an encoder-decoder", done.stderr)
    assert "docs/models.md" in done.stderr
    assert str(log_dir) in done.stderr
    assert "Traceback" not in done.stderr
