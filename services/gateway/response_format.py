"""Choices as the bodies and chunks of the two endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import UNSET, UnsetType

from services.gateway.choice import ChoiceDelta, PositionLogprobs
from services.gateway.openai_responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishName,
    ResponseStruct,
    TopLogprob,
    Usage,
)
from services.gateway.tokenizer import Tokenizer
from shared.core.request import FinishReason

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; the OpenAI API uses this number for it."""

_FINISH_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """What every body and chunk of one call carries."""

    completion_id: str
    created: int
    model: str
    system_fingerprint: str | None


@dataclass(slots=True)
class WholeChoice:
    """A choice put together from its deltas."""

    index: int
    pieces: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append what ``delta`` brought."""
        self.pieces.append(delta.text)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(self.pieces)


class ResponseFormat(Protocol):
    """How an endpoint shows its choices. ``usage`` ``None`` is shown as ``null``."""

    def opening(self, index: int, usage: Usage | UnsetType | None) -> ResponseStruct | None:
        """The chunk before a choice's first text, if there is one."""
        ...

    def piece(self, delta: ChoiceDelta, usage: Usage | UnsetType | None) -> ResponseStruct:
        """The chunk with a delta's text and logprobs."""
        ...

    def closing(
        self, index: int, reason: FinishReason, usage: Usage | UnsetType | None
    ) -> ResponseStruct:
        """The chunk that says why a choice ended."""
        ...

    def usage_chunk(self, usage: Usage) -> ResponseStruct:
        """The last chunk of a stream that was asked for its usage."""
        ...

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ResponseStruct:
        """The body of a call that is not streamed."""
        ...


class ChatFormat:
    """``/v1/chat/completions``."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs

    def opening(self, index: int, usage: Usage | UnsetType | None) -> ResponseStruct:
        """Who speaks."""
        delta = ChatDelta(role="assistant", content="")
        return self._chunk([ChatChunkChoice(index=index, delta=delta)], usage)

    def piece(self, delta: ChoiceDelta, usage: Usage | UnsetType | None) -> ResponseStruct:
        """A piece of the answer."""
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text),
            logprobs=self._logprobs(delta.logprobs),
        )
        return self._chunk([choice], usage)

    def closing(
        self, index: int, reason: FinishReason, usage: Usage | UnsetType | None
    ) -> ResponseStruct:
        """An empty delta with the reason."""
        choice = ChatChunkChoice(
            index=index, delta=ChatDelta(), finish_reason=_FINISH_NAMES[reason]
        )
        return self._chunk([choice], usage)

    def usage_chunk(self, usage: Usage) -> ResponseStruct:
        """No choice, only the usage."""
        return self._chunk([], usage)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ResponseStruct:
        """The answers, complete."""
        return ChatCompletion(
            id=self._envelope.completion_id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AssistantMessage(content=choice.text),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=_finish_name(choice),
                )
                for choice in choices
            ],
            usage=usage,
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._envelope.completion_id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs(content=[self._position(position) for position in positions])

    def _position(self, position: PositionLogprobs) -> ChatTokenLogprob:
        top = zip(position.logprobs.top_ids, position.logprobs.top_logprobs, strict=True)
        return ChatTokenLogprob(
            token=self._tokenizer.token_text(position.token_id),
            logprob=_finite(position.logprobs.logprob),
            bytes=list(self._tokenizer.token_bytes(position.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=self._tokenizer.token_text(token_id),
                    logprob=_finite(logprob),
                    bytes=list(self._tokenizer.token_bytes(token_id)),
                )
                for token_id, logprob in top
            ],
        )


class CompletionFormat:
    """``/v1/completions``."""

    def __init__(
        self, envelope: Envelope, tokenizer: Tokenizer, *, num_logprobs: int | None
    ) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs

    def opening(self, index: int, usage: Usage | UnsetType | None) -> None:
        """Nothing comes before the text."""

    def piece(self, delta: ChoiceDelta, usage: Usage | UnsetType | None) -> ResponseStruct:
        """A piece of the text."""
        choice = CompletionChoice(
            index=delta.index, text=delta.text, logprobs=self._logprobs(delta.logprobs)
        )
        return self._body([choice], usage)

    def closing(
        self, index: int, reason: FinishReason, usage: Usage | UnsetType | None
    ) -> ResponseStruct:
        """No text, only the reason."""
        choice = CompletionChoice(index=index, text="", finish_reason=_FINISH_NAMES[reason])
        return self._body([choice], usage)

    def usage_chunk(self, usage: Usage) -> ResponseStruct:
        """No choice, only the usage."""
        return self._body([], usage)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ResponseStruct:
        """The completions, complete."""
        return self._body(
            [
                CompletionChoice(
                    index=choice.index,
                    text=choice.text,
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=_finish_name(choice),
                )
                for choice in choices
            ],
            usage,
        )

    def _body(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None = UNSET
    ) -> Completion:
        return Completion(
            id=self._envelope.completion_id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(p.token_id) for p in positions],
            token_logprobs=[_finite(p.logprobs.logprob) for p in positions],
            top_logprobs=[self._top(p) for p in positions] if self._num_logprobs else None,
            text_offset=[p.text_offset for p in positions],
        )

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """The most likely tokens, and the chosen one if it is not among them."""
        logprobs, text = position.logprobs, self._tokenizer.token_text
        top = {
            text(token_id): _finite(logprob)
            for token_id, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        }
        top.setdefault(text(position.token_id), _finite(logprobs.logprob))
        return top


def _finish_name(choice: WholeChoice) -> FinishName:
    assert choice.finish_reason is not None, "a choice is complete once it has a finish reason"
    return _FINISH_NAMES[choice.finish_reason]


def _finite(logprob: float) -> float:
    """For JSON; a logprob that is not a number says as little as an impossible one."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
