"""The wire: every message survives it, the unknown is told apart, known bytes stay known."""

import dataclasses
import enum
import types
import typing

import msgspec
import pytest

from shared.core.request import FinishReason, Request, SamplingParams
from shared.errors import ProtocolError, UnknownMessage
from shared.messages import CODEC, subjects
from shared.messages.base import ErrorReply, Message, expect
from shared.messages.requests import Done, SubmitRequest
from shared.messages.tokens import TokenBatch, TokenDelta


def example(kind: object) -> object:
    """Some value of a type, every optional thing present."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return example(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return (example(arguments[0]), example(arguments[0]))
    if origin is dict:
        return {"key": example(arguments[1])}
    if isinstance(kind, type):
        if issubclass(kind, enum.Enum):
            return list(kind)[-1]
        if dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct):
            return kind(**{n: example(t) for n, t in typing.get_type_hints(kind).items()})
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            make: typing.Any = kind
            return make(*(example(t) for t in typing.get_type_hints(kind).values()))
        simple = {int: 7, float: 0.5, str: "text", bytes: b"\x00\xff", bool: True}
        return simple[kind]
    raise TypeError(kind)


@pytest.mark.parametrize("kind", CODEC.types, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Message]) -> None:
    message = example(kind)
    assert isinstance(message, Message)
    assert CODEC.decode(CODEC.encode(message)) == message


def test_bytes_of_yesterday_are_understood_today() -> None:
    request = Request(
        request_id="r",
        attempt=1,
        prompt_token_ids=(5, 300),
        sampling=SamplingParams(max_tokens=4, temperature=0.0),
    )
    submit = SubmitRequest(model="m", gateway="g", request=request, age_s=0.5)
    golden = bytes.fromhex(
        "85a174ad5375626d697452657175657374a56d6f64656ca16da767617465776179a167a772657175657374"
    )
    assert CODEC.encode(submit).startswith(golden)
    tokens = bytes.fromhex(
        "83a174aa546f6b656e4261746368a8696e7374616e6365a164a664656c7461739185aa726571756573745f6964"
        "a172a7617474656d707401a66f666673657403a9746f6b656e5f69647392ccc809ad66696e6973685f72656173"
        "6f6ea473746f70"
    )
    delta = TokenDelta(
        request_id="r", attempt=1, offset=3, token_ids=(200, 9), finish_reason=FinishReason.STOP
    )
    assert CODEC.decode(tokens) == TokenBatch(instance="d", deltas=(delta,))
    assert CODEC.encode(TokenBatch(instance="d", deltas=(delta,))) == tokens


def test_parameters_that_were_not_asked_for_take_no_bytes() -> None:
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    golden = bytes.fromhex("82aa6d61785f746f6b656e7304ab74656d7065726174757265cb0000000000000000")
    assert msgspec.msgpack.encode(greedy) == golden
    assert msgspec.msgpack.decode(golden, type=SamplingParams) == greedy
    # Before there were penalties every parameter was written out.
    golden = bytes.fromhex(
        "89aa6d61785f746f6b656e7304ab74656d7065726174757265cb0000000000000000a5746f705f70cb3ff00000"
        "00000000a5746f705f6bc0a47365656400aa6d696e5f746f6b656e7300ae73746f705f746f6b656e5f69647390"
        "aa69676e6f72655f656f73c2a86c6f6770726f6273c0"
    )
    assert msgspec.msgpack.decode(golden, type=SamplingParams) == greedy
    penalised = SamplingParams(
        max_tokens=1, min_p=0.5, repetition_penalty=2.0, logit_bias=((5, -1.5), (300, 2.0))
    )
    golden = bytes.fromhex(
        "84aa6d61785f746f6b656e7301a56d696e5f70cb3fe0000000000000b272657065746974696f6e5f70656e616c"
        "7479cb4000000000000000aa6c6f6769745f62696173929205cbbff800000000000092cd012ccb400000000000"
        "0000"
    )
    assert msgspec.msgpack.encode(penalised) == golden
    assert msgspec.msgpack.decode(golden, type=SamplingParams) == penalised


def test_a_field_of_tomorrow_is_ignored() -> None:
    data = msgspec.msgpack.encode({"t": "Done", "count": 3, "colour": "blue"})
    assert CODEC.decode(data) == Done(count=3)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (msgspec.msgpack.encode({"t": "Teleport"}), UnknownMessage),
        (msgspec.msgpack.encode({"t": "Done", "count": "three"}), ProtocolError),
        (msgspec.msgpack.encode({"count": 3}), ProtocolError),
        (msgspec.msgpack.encode([1, 2]), ProtocolError),
        (b"", ProtocolError),
        (b"\xff\x00", ProtocolError),
        (b"\x81\xa1t", ProtocolError),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, error: type[ProtocolError]) -> None:
    with pytest.raises(error):
        CODEC.decode(data)


def test_a_receiver_names_what_it_expected() -> None:
    done = Done()
    assert expect(done, Done) is done
    with pytest.raises(UnknownMessage, match="ErrorReply where a Done was expected"):
        expect(ErrorReply(code="c", message="m"), Done)


def test_a_name_is_one_token_whatever_is_in_it() -> None:
    assert subjects.requests("Qwen2.5") == "banyan.v1.requests.Qwen2=2E5"
    names = ["a.b", "a=2Eb", "a b", "a>", "*", "ä", "a/b"]
    tokens = [subjects.token(name) for name in names]
    assert len(set(tokens)) == len(names)
    for token in tokens:
        assert not set(token) & set(". *>")
    with pytest.raises(ValueError, match="empty"):
        subjects.token("")
