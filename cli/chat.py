"""``banyan chat``: talks to a gateway over its OpenAI API."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import httpx

from cli.errors import CommandFailed
from cli.sse import event_data

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 120.0
"""A worker may die in the middle of an answer; its client then sees a pause, not an end."""
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What to ask, and where. ``message`` ``None`` means a conversation at the terminal."""

    url: str
    message: str | None = None
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.3
    api_key: str | None = None
    as_json: bool = False


@dataclass(kw_only=True)
class Answer:
    """An answer, as far as it has come."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    request_id: str | None = None


class Conversation:
    """Questions and answers, each question asked with all that came before it."""

    def __init__(self, http: httpx.Client, request: ChatRequest) -> None:
        self._http = http
        self._request = request
        self.model = request.model or self._served_model()
        self._messages: list[dict[str, str]] = []
        if request.system is not None:
            self._messages.append({"role": "system", "content": request.system})

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """The answer to ``question``; ``show`` gets each piece of its text as it comes.

        Raises ``CommandFailed``; the question is then not part of the conversation. Interrupted, it
        is, with as much of the answer as there was.
        """
        self._messages.append({"role": "user", "content": question})
        answer = Answer()
        try:
            self._stream(answer, show)
        except CommandFailed:
            self._messages.pop()
            raise
        except KeyboardInterrupt:
            self._messages.append({"role": "assistant", "content": answer.text})
            raise
        self._messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _stream(self, answer: Answer, show: Callable[[str], None]) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self._request.temperature,
        }
        if self._request.max_tokens is not None:
            body["max_tokens"] = self._request.max_tokens
        with (
            _explained(self._request.url),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            answer.request_id = response.headers.get("x-request-id")
            if response.status_code != httpx.codes.OK:
                response.read()
                raise CommandFailed(_error_in(response))
            for data in event_data(response.iter_lines()):
                if data == "[DONE]":
                    return
                self._take(answer, _parsed(data), show)
        raise CommandFailed(f"the answer broke off (request {answer.request_id})")

    def _take(self, answer: Answer, chunk: dict[str, Any], show: Callable[[str], None]) -> None:
        if "error" in chunk:
            raise CommandFailed(f"{_message_of(chunk)} (request {answer.request_id})")
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk.get("choices", ()):
            text = choice.get("delta", {}).get("content") or ""
            answer.text += text
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            if text:
                show(text)

    def _served_model(self) -> str:
        """The model the gateway serves; the first, if several."""
        with _explained(self._request.url):
            response = self._http.get("/v1/models")
        if response.status_code != httpx.codes.OK:
            raise CommandFailed(_error_in(response))
        models = _parsed(response.text).get("data", [])
        if not models:
            raise CommandFailed(f"{self._request.url} serves no model")
        return str(models[0]["id"])


def run_chat(request: ChatRequest, output: TextIO, errors: TextIO) -> int:
    """Ask and print; returns the exit code. Raises ``CommandFailed`` if no answer comes."""

    def show(text: str) -> None:
        output.write(text)
        output.flush()

    headers = {"authorization": f"Bearer {request.api_key}"} if request.api_key else {}
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with _client(request.url, headers, timeout) as http:
        try:
            conversation = Conversation(http, request)
            if request.message is None:
                _converse(conversation, show, errors)
            elif request.as_json:
                answer = conversation.ask(request.message, lambda text: None)
                show(json.dumps(_as_json(conversation.model, answer)) + "\n")
            else:
                conversation.ask(request.message, show)
                show("\n")
        except KeyboardInterrupt:
            show("\n")
            return EXIT_INTERRUPTED
    return 0


def _converse(conversation: Conversation, show: Callable[[str], None], errors: TextIO) -> None:
    """Question and answer in turn, until Ctrl-D (or Ctrl-C instead of a question)."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        errors.write(f"Talking to {conversation.model}. Ctrl-C stops an answer, Ctrl-D leaves.\n")
    while True:
        try:
            question = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                show("\n")
            return
        if not question.strip():
            continue
        try:
            conversation.ask(question, show)
        except KeyboardInterrupt:
            show(" …")
        except CommandFailed as error:
            errors.write(f"error: {error}")
        show("\n")


def _client(url: str, headers: dict[str, str], timeout: httpx.Timeout) -> httpx.Client:
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    try:
        return httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        raise CommandFailed(f"--url={url}: {error}") from error


def _as_json(model: str, answer: Answer) -> dict[str, Any]:
    return {
        "model": model,
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "request_id": answer.request_id,
    }


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Failures of the connection, in words that say what to do."""
    try:
        yield
    except httpx.ConnectError as error:
        raise CommandFailed(
            f"nothing listens at {url}: start the suite with `make up` (or `banyan up`), "
            "or say where it is with --url"
        ) from error
    except httpx.TimeoutException as error:
        raise CommandFailed(
            f"{url} does not answer; `banyan status` shows what the suite is doing"
        ) from error
    except httpx.HTTPError as error:
        raise CommandFailed(f"the connection to {url} broke: {error!r}") from error


def _parsed(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise CommandFailed(f"not the answer of a gateway: {text[:200]!r}") from error
    if not isinstance(parsed, dict):
        raise CommandFailed(f"not the answer of a gateway: {text[:200]!r}")
    return parsed


def _error_in(response: httpx.Response) -> str:
    message = f"HTTP {response.status_code}: {_message_of(_parsed(response.text))}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{message} (give a key with --api-key or BANYAN_API_KEY)"
    retry_after_s = response.headers.get("retry-after")
    return f"{message} (try again in {retry_after_s} s)" if retry_after_s else message


def _message_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(error or body)
