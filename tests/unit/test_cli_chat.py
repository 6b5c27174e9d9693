"""``banyan chat`` against a gateway made of httpx's own fake transport."""

import io
import json
from collections.abc import Callable, Iterable

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
