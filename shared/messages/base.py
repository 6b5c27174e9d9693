"""The base of every wire type, and the codec: msgpack with a tag, nothing else on the bus."""

from typing import Any, TypeVar

import msgspec

from shared.errors import ProtocolError, UnknownMessage


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    """Base of all wire types, tagged by their class name. Unknown fields are ignored.

    A concrete message's docstring names its publisher, subscribers, delivery and idempotency key;
    ``docs/messages.md`` is generated from it.
    """


M = TypeVar("M", bound=Message)


class MessageCodec:
    """Encodes messages and decodes them back by their tag.

    ``types`` are the concrete message classes this codec knows; see ``shared.messages.CODEC``.
    """

    def __init__(self, types: tuple[type[Message], ...]) -> None:
        self.types = types
        union: Any = types[0]
        for extra in types[1:]:
            union = union | extra
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        self._tags = {t.__struct_config__.tag for t in types}

    def encode(self, message: Message) -> bytes:
        """The message as msgpack bytes."""
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> Message:
        """The message in ``data``.

        Raises ``UnknownMessage`` for a tag this version does not know and ``ProtocolError`` for
        anything else that is no message.
        """
        try:
            message: Message = self._decoder.decode(data)
        except msgspec.ValidationError as error:
            tag = self._tag_of(data)
            if tag is not None and tag not in self._tags:
                raise UnknownMessage(f"unknown message {tag!r}") from error
            raise ProtocolError(f"malformed {tag or 'message'}: {error}") from error
        except msgspec.DecodeError as error:
            raise ProtocolError(f"not msgpack: {error}") from error
        return message

    @staticmethod
    def _tag_of(data: bytes) -> str | None:
        try:
            raw = msgspec.msgpack.decode(data)
        except msgspec.DecodeError:
            return None
        tag = raw.get("t") if isinstance(raw, dict) else None
        return tag if isinstance(tag, str) else None


def expect(message: Message, kind: type[M]) -> M:
    """``message`` as the one kind its receiver takes; raises ``UnknownMessage`` otherwise."""
    if not isinstance(message, kind):
        raise UnknownMessage(f"{type(message).__name__} where a {kind.__name__} was expected")
    return message


class ErrorReply(Message, frozen=True, kw_only=True, tag="ErrorReply"):
    """A handler's answer when it cannot do what was asked: the bus raises it as ``RemoteError``.

    Publisher: whoever serves a request/reply subject. Subscriber: the requester. Delivery: the
    reply of a core request. Idempotency: none needed.
    """

    code: str
    message: str
