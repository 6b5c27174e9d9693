"""``banyan chat``: talks to a gateway over its OpenAI API."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx

from cli.errors import CommandFailed
from cli.line_input import LineInput
from cli.sse import event_data
from shared.directories import data_dir

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 120.0
"""A worker may die in the middle of an answer; its client then sees a pause, not an end."""
EXIT_INTERRUPTED = 130
HELP = """\
/new   forget what was said so far
/help  this
Ctrl-C stops an answer, Ctrl-D leaves; the arrow keys bring former questions back.
"""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What to ask, and where. ``message`` ``None`` means a conversation at the terminal."""

    url: str
    message: str | None = None
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.3
    api_key: str | None = field(default=None, repr=False)
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
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._messages: list[dict[str, str]] = []
        if self._request.system is not None:
            self._messages.append({"role": "system", "content": self._request.system})

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """The answer to ``question``; ``show`` gets each piece of its text as it comes.

        Raises ``CommandFailed``; the question is then not part of the conversation. Interrupted, it
        is, with as much of the answer as there was, if there was any.
        """
        self._messages.append({"role": "user", "content": question})
        answer = Answer()
        try:
            self._stream(answer, show)
        except CommandFailed:
            self._messages.pop()
            raise
        except KeyboardInterrupt:
            self._conclude(answer)
            raise
        self._conclude(answer)
        return answer

    def _conclude(self, answer: Answer) -> None:
        if answer.text:
            self._messages.append({"role": "assistant", "content": answer.text})
        else:
            self._messages.pop()

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

    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with _client(request.url, _headers(request.api_key), timeout) as http:
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
    """Question and answer in turn, until Ctrl-D. Without a terminal, a question a line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        errors.write(f"Talking to {conversation.model}; /help says how.\n")
    with LineInput(data_dir() / "chat_history", is_terminal=is_terminal) as line_input:
        while True:
            try:
                question = line_input.read("you> " if is_terminal else "")
            except EOFError:
                if is_terminal:
                    show("\n")
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                show("\n")
                continue
            if is_terminal and question.strip().startswith("/"):
                _obey(question.strip(), conversation, errors)
            elif question.strip():
                _ask(conversation, question, show, errors)


def _ask(
    conversation: Conversation, question: str, show: Callable[[str], None], errors: TextIO
) -> None:
    try:
        conversation.ask(question, show)
    except KeyboardInterrupt:
        show(" …")
    except CommandFailed as error:
        errors.write(f"error: {error}")
        errors.flush()
    show("\n")


def _obey(command: str, conversation: Conversation, errors: TextIO) -> None:
    """A line that begins with ``/`` is for us, not for the model."""
    if command == "/new":
        conversation.begin_anew()
        errors.write("forgotten\n")
    elif command == "/help":
        errors.write(HELP)
    else:
        errors.write(f"no such command: {command}\n{HELP}")


def _headers(api_key: str | None) -> dict[str, str]:
    """Who asks. Raises ``CommandFailed``, without the key, for one that no header can carry."""
    key = (api_key or "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise CommandFailed(
            "BANYAN_API_KEY (or --api-key): it has spaces or letters that are in no key"
        )
    return {"authorization": f"Bearer {key}"}


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
    body = _parsed(response.text)
    message = f"HTTP {response.status_code}: {_message_of(body)}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{message} (give a key with --api-key or BANYAN_API_KEY; `banyan keys create`)"
    error = body.get("error")
    if isinstance(error, dict) and error.get("code") == "context_length_exceeded":
        return f"{message} (a new conversation has room again: /new)"
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        message += " (`banyan status` shows what is missing)"
    retry_after_s = response.headers.get("retry-after")
    return f"{message} (try again in {retry_after_s} s)" if retry_after_s else message


def _message_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(error or body)
