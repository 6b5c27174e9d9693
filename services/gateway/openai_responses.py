"""Response bodies of the OpenAI API, whole and in chunks."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishName = Literal["stop", "length"]


class ResponseStruct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is sent; fields that are ``UNSET`` are left out."""


class PromptTokensDetails(ResponseStruct, frozen=True, kw_only=True):
    """``cached_tokens`` of the prompt were not computed again."""

    cached_tokens: int


class Usage(ResponseStruct, frozen=True, kw_only=True):
    """Tokens of the whole call; a prompt counts once whatever ``n`` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(ResponseStruct, frozen=True, kw_only=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ResponseStruct, frozen=True, kw_only=True):
    """One token of a chat answer, with the most likely ones beside it."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseStruct, frozen=True, kw_only=True):
    """Logprobs of a chat answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(ResponseStruct, frozen=True, kw_only=True):
    """The model's turn."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(ResponseStruct, frozen=True, kw_only=True):
    """One of ``n`` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName


class ChatCompletion(ResponseStruct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(ResponseStruct, frozen=True, kw_only=True):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(ResponseStruct, frozen=True, kw_only=True):
    """One of ``n`` answers in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None


class ChatCompletionChunk(ResponseStruct, frozen=True, kw_only=True):
    """One server-sent event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(ResponseStruct, frozen=True, kw_only=True):
    """Logprobs of a text completion; the lists run in parallel."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(ResponseStruct, frozen=True, kw_only=True):
    """One completion, or in a chunk what it grew by."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishName | None = None


class Completion(ResponseStruct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/completions``, and each server-sent event of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class ModelEntry(ResponseStruct, frozen=True, kw_only=True):
    """A model that can be named in requests."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "banyan"


class ModelList(ResponseStruct, frozen=True, kw_only=True):
    """Answer of ``GET /v1/models``."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"
