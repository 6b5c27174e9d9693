"""Request bodies of the OpenAI API, with what inference servers usually add to them.

Strict: a number is no string and ``true`` no number. ``null`` means not set. Unknown fields are
ignored; fields that would change the answer in a way this system cannot deliver are refused unless
they hold their neutral value (``services.gateway.unsupported``).
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 2048
MAX_PROMPTS = 128
MAX_CHOICES_PER_PROMPT = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100
MAX_LOGIT_BIASES = 1024
MAX_PRIORITY = 1000
MAX_MILLISECONDS = 1e9

TAG_MARK = "~"
"""Begins the names of alternatives, which are no part of a field's path."""

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


class Body(BaseModel):
    """Base of everything a caller sends."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


def _kind(value: Any) -> str | None:
    """Which alternative of a union a value means to be, so that its errors name one path."""
    if isinstance(value, str):
        return "~text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, list):
        return "~token id lists"
    return "~texts" if isinstance(first, str) else "~token ids"


def _text_or_list(value: Any) -> str | None:
    kind = _kind(value)
    return kind if kind is None or kind == "~text" else "~list"


def _only_roles(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError("unsupported_value", "tool messages are not supported")
    return value


def _only_text(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError("unsupported_value", "only parts of type 'text' are supported")
    return value


def _bias_of(value: Any) -> Any:
    """``{"token id": bias}`` with its keys as numbers; its faults are those of the whole field."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIASES:
        raise _bias_fault(f"at most {MAX_LOGIT_BIASES} tokens can be biased, not {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(key):
            raise _bias_fault(f"{key[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _bias_fault(f"the bias of token {key} is not a number")
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise _bias_fault(
                f"the bias of token {key} is not in [-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
            )
        biases[int(key)] = float(bias)
    return biases


def _bias_fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("logit_bias", "{fault}", {"fault": message})


Penalty = Annotated[float | None, Field(ge=-2, le=2)]
LogitBias = Annotated[dict[int, float] | None, BeforeValidator(_bias_of)]
Milliseconds = Annotated[float | None, Field(gt=0, le=MAX_MILLISECONDS)]
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Stop = Annotated[
    Annotated[StopString, Tag("~text")] | Annotated[StopStrings, Tag("~list")],
    Discriminator(
        _text_or_list,
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[
        list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("~texts")
    ]
    | Annotated[TokenIds, Tag("~token ids")]
    | Annotated[
        list[TokenIds],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        Tag("~token id lists"),
    ],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids "
        "or a list of lists of token ids",
    ),
]


class SloBody(Body):
    """What the caller asks to be promised; also the headers ``x-slo-ttft-ms`` and so on."""

    ttft_ms: Milliseconds = Field(None, description="time to first token")
    tpot_ms: Milliseconds = Field(None, description="mean time per output token after the first")
    e2e_ms: Milliseconds = Field(None, description="time to the last token")


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool | None = Field(None, description="end with a chunk that has the usage")
    continuous_usage_stats: bool | None = Field(None, description="usage in every chunk")


class GenerationBody(Body):
    """The fields that chat and text completions share."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: Annotated[int | None, Field(ge=1, le=_INT32_MAX)] = Field(
        None, description="by default what the prompt leaves of the context"
    )
    min_tokens: Annotated[int | None, Field(ge=0, le=_INT32_MAX)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=_INT32_MAX)] = Field(
        None, description="-1 and 0 mean no limit"
    )
    min_p: Annotated[float | None, Field(ge=0, le=1)] = Field(
        None, description="drop tokens less likely than this share of the likeliest one's chance"
    )
    presence_penalty: Penalty = Field(None, description="for tokens that are in the output")
    frequency_penalty: Penalty = Field(None, description="for each time a token is in the output")
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = Field(
        None, description="for tokens that are in prompt or output; above 1 discourages them"
    )
    logit_bias: LogitBias = Field(
        None, description="added to the logits of token ids, -100 to 100 each"
    )
    seed: Annotated[int | None, Field(ge=-_INT64_MAX - 1, le=_INT64_MAX)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] = None
    stop: Stop | None = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    ] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Field(max_length=512)] = None
    slo: SloBody | None = None
    priority: Annotated[int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = Field(
        None, description="smaller goes first"
    )


class TextPart(Body):
    """One part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_only_text)]
    text: str


Content = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("~list")],
    Discriminator(
        _text_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class Message(Body):
    """One turn of a chat. Parts of the content are joined by line breaks."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"], BeforeValidator(_only_roles)
    ]
    content: Content
    name: Annotated[str | None, Field(max_length=512)] = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=_INT32_MAX)] = Field(
        None, description="the newer name of max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="more variables for the model's chat template"
    )


class CompletionRequest(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] = Field(
        None, description="only the value of n is supported"
    )
