"""A client for compose.sh: asks a gateway and checks what comes. Standard library only.

::

    compose_client.py wait URL SECONDS            until the gateway is ready
    compose_client.py chat URL                    one question; prints the answer
    compose_client.py streams URL COUNT TOKENS [COMMAND...]
                                                  COUNT answers of TOKENS tokens at once; COMMAND
                                                  runs when each of them has begun. All must be
                                                  whole: as many tokens as asked for, a reason why
                                                  they ended, and the end of the stream

The exit code is 0 if all is well.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

QUESTION = "Tell me about trees. " * 30 + "What is a banyan tree?"
"""Long enough for the KV store to keep some of it."""
TIMEOUT_S = 120.0
BEGUN_PIECES = 10


def _post(url: str, body: dict[str, Any]) -> Any:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=TIMEOUT_S) as response:
        model = json.load(response)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({"model": model, "temperature": 0, **body}).encode(),
        {"content-type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def wait(url: str, seconds: str) -> str | None:
    """What is wrong, or ``None`` if the gateway got ready in time."""
    deadline_s = time.monotonic() + float(seconds)
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=2):
                return None
        except urllib.error.HTTPError as error:
            found = error.read().decode()
        except OSError as error:
            found = str(error)
        if time.monotonic() > deadline_s:
            return f"{url} is not ready after {seconds} s: {found}"
        time.sleep(0.5)


def chat(url: str) -> str | None:
    """What is wrong, or ``None`` if there was an answer, which is printed."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}
    with _post(url, body) as response:
        choice = json.load(response)["choices"][0]
    print(f"{url}: {choice['message']['content']!r}")
    if not choice["message"]["content"] or choice["finish_reason"] not in ("stop", "length"):
        return f"no whole answer: {choice}"
    return None


class Stream:
    """One streamed answer, read by a thread of its own."""

    def __init__(self, url: str, num_tokens: int, number: int) -> None:
        self.has_begun = threading.Event()
        self.problem: str | None = "did not end"
        self._url = url
        self._num_tokens = num_tokens
        self._question = f"{number}. {QUESTION}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.problem = self._read()
        except (OSError, ValueError, KeyError) as error:
            self.problem = repr(error)
        self.has_begun.set()

    def _read(self) -> str | None:
        body = {
            "messages": [{"role": "user", "content": self._question}],
            "max_tokens": self._num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_pieces, reason, usage = 0, None, None
        with _post(self._url, body) as response:
            for line in response:
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    found = (reason, usage and usage["completion_tokens"])
                    expected = ("length", self._num_tokens)
                    return None if found == expected else f"{found} instead of {expected}"
                if not data:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    return f"an error: {chunk['error']}"
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    num_pieces += 1
                if num_pieces >= BEGUN_PIECES:
                    self.has_begun.set()
        return "the stream broke off"


def streams(url: str, count: str, num_tokens: str, *command: str) -> str | None:
    """What is wrong, or ``None`` if all answers were whole."""
    running = [Stream(url, int(num_tokens), number) for number in range(int(count))]
    for stream in running:
        if not stream.has_begun.wait(TIMEOUT_S):
            return "a stream did not begin"
    num_under_way = sum(stream.thread.is_alive() for stream in running)
    if command:
        if num_under_way < len(running):
            return f"only {num_under_way} streams are still under way: ask for more tokens"
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    began_s = time.monotonic()
    for stream in running:
        stream.thread.join(TIMEOUT_S)
    problems = [f"stream {i}: {s.problem}" for i, s in enumerate(running) if s.problem]
    if not problems:
        print(f"{count} streams of {num_tokens} tokens, all whole", end="")
        print(f", {time.monotonic() - began_s:.1f} s after the command" if command else "")
    return "; ".join(problems) or None


if __name__ == "__main__":
    actions: dict[str, Callable[..., str | None]] = {"wait": wait, "chat": chat, "streams": streams}
    sys.exit(actions[sys.argv[1]](*sys.argv[2:]))
