"""``banyan chat`` against a gateway made of httpx's own fake transport."""

import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from cli.chat import ChatRequest, Conversation, run_chat
from cli.errors import CommandFailed
from cli.sse import event_data

URL = "http://gateway"


def chunk(text: str | None = None, finish_reason: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def stream(*events: str) -> httpx.Response:
    body = "".join(f"data: {event}\n\n" for event in events)
    return httpx.Response(200, text=body, headers={"x-request-id": "r-1"})


class Gateway:
    """Answers each question with the next of ``responses``, and remembers what it was asked."""

    def __init__(self, *responses: httpx.Response) -> None:
        self.bodies: list[dict[str, object]] = []
        self._responses = list(responses)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}, {"id": "other"}]})
        self.bodies.append(json.loads(request.content))
        return self._responses.pop(0)


def conversation(
    gateway: Callable[[httpx.Request], httpx.Response], request: ChatRequest | None = None
) -> Conversation:
    http = httpx.Client(base_url=URL, transport=httpx.MockTransport(gateway))
    return Conversation(http, request or ChatRequest(url=URL))


def test_an_answer_is_shown_piece_by_piece() -> None:
    usage = json.dumps({"choices": [], "usage": {"total_tokens": 5}})
    gateway = Gateway(stream(chunk("A "), chunk("tree."), chunk(None, "stop"), usage, "[DONE]"))
    pieces: list[str] = []
    answer = conversation(gateway).ask("What?", pieces.append)
    assert pieces == ["A ", "tree."]
    assert answer.text == "A tree."
    assert answer.finish_reason == "stop"
    assert answer.usage == {"total_tokens": 5}
    assert answer.request_id == "r-1"


def test_each_question_is_asked_with_all_that_came_before() -> None:
    gateway = Gateway(
        stream(chunk("One."), chunk(None, "stop"), "[DONE]"),
        stream(chunk("Two."), chunk(None, "stop"), "[DONE]"),
    )
    request = ChatRequest(url=URL, system="Be brief.", max_tokens=9, temperature=0.0)
    talk = conversation(gateway, request)
    talk.ask("First?", lambda text: None)
    talk.ask("Second?", lambda text: None)
    assert [message["content"] for message in gateway.bodies[1]["messages"]] == [  # type: ignore[attr-defined]
        "Be brief.",
        "First?",
        "One.",
        "Second?",
    ]
    assert gateway.bodies[1]["model"] == "tiny"
    assert gateway.bodies[1]["max_tokens"] == 9
    assert gateway.bodies[1]["temperature"] == 0.0


def test_what_was_not_asked_for_is_left_to_the_gateway() -> None:
    gateway = Gateway(stream("[DONE]"))
    conversation(gateway, ChatRequest(url=URL, model="mine")).ask("?", lambda text: None)
    assert gateway.bodies[0]["model"] == "mine"
    assert "max_tokens" not in gateway.bodies[0]
    assert gateway.bodies[0]["temperature"] == 0.3


def error(status: int, message: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (error(400, "max_tokens is too large"), "HTTP 400: max_tokens is too large"),
        (error(429, "too busy", **{"retry-after": "3"}), "too busy .try again in 3 s"),
        (error(401, "no key"), "BANYAN_API_KEY"),
        (error(503, "no scheduler leads"), "no scheduler leads .`banyan status`"),
        (
            httpx.Response(
                400, json={"error": {"message": "long", "code": "context_length_exceeded"}}
            ),
            "long .*/new",
        ),
        (httpx.Response(200, text="data: <html>\n\n"), "not the answer of a gateway"),
        (httpx.Response(502, text="Bad Gateway"), "not the answer of a gateway"),
        (stream(chunk("half a "), json.dumps({"error": {"message": "lost"}})), "lost .request r-1"),
        (stream(chunk("half a ")), "broke off"),
    ],
)
def test_a_failure_is_told_and_is_no_part_of_the_conversation(
    response: httpx.Response, says: str
) -> None:
    gateway = Gateway(response, stream("[DONE]"))
    talk = conversation(gateway)
    with pytest.raises(CommandFailed, match=says):
        talk.ask("First?", lambda text: None)
    talk.ask("Second?", lambda text: None)
    assert gateway.bodies[1]["messages"] == [{"role": "user", "content": "Second?"}]


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_came() -> None:
    def interrupt(text: str) -> None:
        if text == "two":
            raise KeyboardInterrupt

    gateway = Gateway(stream(chunk("one "), chunk("two"), chunk(" three")), stream("[DONE]"))
    talk = conversation(gateway)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Count.", interrupt)
    talk.ask("On.", lambda text: None)
    assert gateway.bodies[1]["messages"][1] == {"role": "assistant", "content": "one two"}  # type: ignore[index]


def test_a_question_that_was_interrupted_before_its_answer_began_is_forgotten() -> None:
    def interrupt(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        bodies.append(json.loads(request.content))
        if len(bodies) == 1:
            raise KeyboardInterrupt
        return stream("[DONE]")

    bodies: list[dict[str, object]] = []
    talk = conversation(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("First?", lambda text: None)
    talk.ask("Second?", lambda text: None)
    assert bodies[1]["messages"] == [{"role": "user", "content": "Second?"}]


def test_a_new_conversation_keeps_the_system_message_only() -> None:
    gateway = Gateway(stream(chunk("One."), "[DONE]"), stream("[DONE]"))
    talk = conversation(gateway, ChatRequest(url=URL, system="Be brief."))
    talk.ask("First?", lambda text: None)
    talk.begin_anew()
    talk.ask("Second?", lambda text: None)
    assert gateway.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Second?"},
    ]


def test_a_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization", ""))
        return error(401, "wrong key")

    class Client(httpx.Client):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, transport=httpx.MockTransport(gateway))

    monkeypatch.setattr(httpx, "Client", Client)
    request = ChatRequest(url=URL, message="?", api_key="sk-secret\n")
    output, errors = io.StringIO(), io.StringIO()
    with pytest.raises(CommandFailed) as failed:
        run_chat(request, output, errors)
    assert seen == ["Bearer sk-secret"]
    assert "banyan keys create" in str(failed.value)
    for text in (str(failed.value), output.getvalue(), errors.getvalue(), repr(request)):
        assert "secret" not in text


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nbreak", "\x1b[31m"])
def test_what_cannot_be_a_key_is_refused_unseen(key: str) -> None:
    request = ChatRequest(url="http://127.0.0.1:1", message="?", api_key=key)
    with pytest.raises(CommandFailed, match="BANYAN_API_KEY") as failed:
        run_chat(request, io.StringIO(), io.StringIO())
    assert key not in str(failed.value)


@pytest.mark.parametrize("status", [200, 503])
def test_a_gateway_without_a_model_is_no_use(status: int) -> None:
    response = httpx.Response(status, json={"data": [], "error": {"message": "not ready"}})
    with pytest.raises(CommandFailed, match=r"serves no model|not ready"):
        conversation(lambda request: response)


def test_where_nothing_listens_the_user_is_told_what_to_start() -> None:
    request = ChatRequest(url="http://127.0.0.1:1", message="?")  # nobody has port 1
    with pytest.raises(CommandFailed, match="make up"):
        run_chat(request, io.StringIO(), io.StringIO())


@pytest.mark.parametrize(
    ("lines", "events"),
    [
        (["data: a", "", "data: b", ""], ["a", "b"]),
        (["data:a", ""], ["a"]),
        (["data: a", "data: b", ""], ["a\nb"]),
        ([": ping", "", "event: x", "data: a", "id: 1", ""], ["a"]),
        (["data: whole", "", "data: half"], ["whole"]),
        (["data: {'a: b'}", ""], ["{'a: b'}"]),
        ([], []),
    ],
)
def test_events_are_read_as_the_standard_says(lines: Iterable[str], events: list[str]) -> None:
    assert list(event_data(lines)) == events
