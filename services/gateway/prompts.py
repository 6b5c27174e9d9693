"""Prompts of both endpoints as token ids that fit the model."""

import asyncio
from collections.abc import Sequence

from services.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from services.gateway.served_model import ServedModel
from services.gateway.tokenizer import THREAD_FROM_CHARS
from shared.errors import ContextLengthExceeded, InvalidRequest


async def chat_prompt(body: ChatCompletionRequest, model: ServedModel) -> tuple[int, ...]:
    """The chat as the model's template writes it; long ones are worked on in a thread.

    Raises ``InvalidRequest`` if the model has no template or its template refuses the messages.
    """
    template, tokenizer = model.chat_template, model.tokenizer
    if template is None:
        raise InvalidRequest(
            f"the model {model.name!r} has no chat template; use /v1/completions",
            field="messages",
        )
    messages = [
        {"role": m.role, "content": m.text} | ({} if m.name is None else {"name": m.name})
        for m in body.messages
    ]
    _refuse_too_long(sum(tokenizer.min_tokens(m["content"]) for m in messages), model, "messages")

    def encode() -> list[int]:
        text = template.render(
            messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            variables=body.chat_template_kwargs,
        )
        # The template has written the special tokens already.
        return tokenizer.encode_now(text, add_special_tokens=False)

    if sum(len(m["content"]) for m in messages) < THREAD_FROM_CHARS:
        return tuple(encode())
    return tuple(await asyncio.to_thread(encode))


async def completion_prompts(body: CompletionRequest, model: ServedModel) -> list[tuple[int, ...]]:
    """The prompts in their order; raises ``InvalidRequest`` naming the one at fault."""
    match body.prompt:
        case str(text):
            texts = [text]
        case [str(), *_]:
            texts = [text for text in body.prompt if isinstance(text, str)]
        case [int(), *_]:
            return [_token_ids([i for i in body.prompt if isinstance(i, int)], model, "prompt")]
        case _:
            lists = [ids for ids in body.prompt if isinstance(ids, list)]
            return [_token_ids(ids, model, f"prompt[{n}]") for n, ids in enumerate(lists)]
    tokenizer = model.tokenizer
    for number, text in enumerate(texts):
        field = "prompt" if len(texts) == 1 else f"prompt[{number}]"
        _refuse_too_long(tokenizer.min_tokens(text), model, field)

    def encode() -> list[tuple[int, ...]]:
        return [tuple(tokenizer.encode_now(text, add_special_tokens=True)) for text in texts]

    if sum(map(len, texts)) < THREAD_FROM_CHARS:
        return encode()
    return await asyncio.to_thread(encode)


def _token_ids(token_ids: list[int], model: ServedModel, field: str) -> tuple[int, ...]:
    _refuse_too_long(len(token_ids), model, field)
    for position, token_id in enumerate(token_ids):
        check_in_vocabulary(token_id, model, f"{field}[{position}]")
    return tuple(token_ids)


def check_in_vocabulary(token_id: int, model: ServedModel, field: str) -> None:
    """Raise ``InvalidRequest`` for ``field`` unless the model knows ``token_id``."""
    if token_id >= model.vocab_size:
        raise InvalidRequest(
            f"token id {token_id} is not in the vocabulary of {model.vocab_size}", field=field
        )


def _refuse_too_long(num_tokens: int, model: ServedModel, field: str) -> None:
    """Of a prompt that has at least ``num_tokens``."""
    if num_tokens >= model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_tokens} tokens or more; the context of {model.name!r} is "
            f"{model.max_model_len} tokens for prompt and output together",
            field=field,
        )


def room_behind(prompt: Sequence[int], model: ServedModel, field: str) -> int:
    """How many output tokens fit behind ``prompt``; at least one."""
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", field=field)
    if len(prompt) >= model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens; the context of {model.name!r} is "
            f"{model.max_model_len} tokens for prompt and output together",
            field=field,
        )
    return model.max_model_len - len(prompt)
