"""From a checked body to the requests to generate: tokenised, with every default filled in."""

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.gateway.generation import GenerationRequest
from services.gateway.openai_types import (
    MAX_MILLISECONDS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationBody,
)
from services.gateway.prompts import (
    chat_prompt,
    check_in_vocabulary,
    completion_prompts,
    room_behind,
)
from services.gateway.served_model import ServedModel
from services.gateway.unsupported import CHAT, COMPLETION, MESSAGE, refuse_unsupported
from shared.core.request import SamplingParams, Slo
from shared.errors import ContextLengthExceeded, InvalidRequest

MAX_CHOICES = 128
"""Of one call, over all its prompts."""

_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """What is known of a request apart from its body."""

    request_id: str
    client_request_id: str | None
    tenant: str
    headers: Mapping[str, str]
    arrived_at_s: float
    key_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One call: what to generate, and how to show it.

    ``requests`` are ordered by their ``index``; choice ``i`` belongs to prompt
    ``i // num_choices_per_prompt``.
    """

    model: ServedModel
    requests: tuple[GenerationRequest, ...]
    num_choices_per_prompt: int
    stop_strings: tuple[str, ...]
    is_stream: bool
    has_usage_chunk: bool
    has_usage_in_every_chunk: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Of the whole call, each prompt counted once."""
        firsts = self.requests[:: self.num_choices_per_prompt]
        return sum(len(request.prompt_token_ids) for request in firsts)


class Planner:
    """Makes plans; the only randomness is the seed of calls that name none."""

    def __init__(self, random_seed: Callable[[], int] | None = None) -> None:
        """``random_seed`` gives a fresh number below 2**63; by default from the system."""
        self._random_seed = random_seed or (lambda: secrets.randbits(63))

    async def chat(self, body: ChatCompletionRequest, model: ServedModel, caller: Caller) -> Plan:
        """The plan for a chat completion; raises ``InvalidRequest``."""
        refuse_unsupported(body.model_extra, CHAT)
        for index, message in enumerate(body.messages):
            refuse_unsupported(message.model_extra, MESSAGE, path=f"messages[{index}].")
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true", field="top_logprobs")
        max_tokens, max_tokens_field = _chat_max_tokens(body)
        prompt = await chat_prompt(body, model)
        return self._plan(
            body,
            model,
            caller,
            prompts=[prompt],
            prompt_field="messages",
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    async def completion(self, body: CompletionRequest, model: ServedModel, caller: Caller) -> Plan:
        """The plan for a text completion; raises ``InvalidRequest``."""
        refuse_unsupported(body.model_extra, COMPLETION)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest(
                "'best_of' is not supported by this server (accepted: the value of 'n')",
                field="best_of",
                code="unsupported_parameter",
            )
        return self._plan(
            body,
            model,
            caller,
            prompts=await completion_prompts(body, model),
            prompt_field="prompt",
            max_tokens=body.max_tokens,
            max_tokens_field="max_tokens",
            num_logprobs=body.logprobs,
        )

    def _plan(
        self,
        body: GenerationBody,
        model: ServedModel,
        caller: Caller,
        *,
        prompts: Sequence[tuple[int, ...]],
        prompt_field: str,
        max_tokens: int | None,
        max_tokens_field: str,
        num_logprobs: int | None,
    ) -> Plan:
        _check_stream_options(body)
        stop_strings = _stop_strings(body)
        num_choices = body.n or 1
        if len(prompts) * num_choices > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n={num_choices} make more than {MAX_CHOICES} choices",
                field="n",
            )
        slo = slo_of(body, caller.headers)
        requests: list[GenerationRequest] = []
        for number, prompt in enumerate(prompts):
            field = prompt_field if len(prompts) == 1 else f"{prompt_field}[{number}]"
            room = room_behind(prompt, model, field)
            sampling = _sampling(
                body, model, _within(max_tokens, room, max_tokens_field, model), num_logprobs
            )
            seed = self._random_seed() if body.seed is None else body.seed
            for sample in range(num_choices):
                index = len(requests)
                lone = len(prompts) * num_choices == 1
                requests.append(
                    GenerationRequest(
                        request_id=caller.request_id if lone else f"{caller.request_id}-{index}",
                        index=index,
                        model=model.name,
                        prompt_token_ids=prompt,
                        sampling=sampling(choice_seed(seed, sample)),
                        slo=slo,
                        priority=body.priority or 0,
                        tenant=caller.tenant,
                        group_id=f"{caller.request_id}-p{number}" if num_choices > 1 else None,
                        client_request_id=caller.client_request_id,
                        arrived_at_s=caller.arrived_at_s,
                        api="chat" if isinstance(body, ChatCompletionRequest) else "completion",
                        is_stream=bool(body.stream),
                        key_id=caller.key_id,
                    )
                )
        options = body.stream_options
        return Plan(
            model=model,
            requests=tuple(requests),
            num_choices_per_prompt=num_choices,
            stop_strings=stop_strings,
            is_stream=bool(body.stream),
            has_usage_chunk=bool(options and options.include_usage),
            has_usage_in_every_chunk=bool(options and options.continuous_usage_stats),
        )


def choice_seed(seed: int, sample: int) -> int:
    """The seed of the ``sample``-th choice of a prompt: the call's own for the first.

    The others are hashed, so that calls with seeds 1 and 2 share no choice.
    """
    if sample == 0:
        return seed & _SEED_MASK
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _SEED_MASK


def slo_of(body: GenerationBody, headers: Mapping[str, str]) -> Slo:
    """The promises asked for in the body or, where it has none, in the headers."""
    asked = body.slo
    return Slo(
        ttft_s=_seconds(asked.ttft_ms if asked else None, headers, "x-slo-ttft-ms"),
        tpot_s=_seconds(asked.tpot_ms if asked else None, headers, "x-slo-tpot-ms"),
        e2e_s=_seconds(asked.e2e_ms if asked else None, headers, "x-slo-e2e-ms"),
    )


def _seconds(milliseconds: float | None, headers: Mapping[str, str], name: str) -> float | None:
    if milliseconds is None and name in headers:
        try:
            milliseconds = float(headers[name])
        except ValueError:
            milliseconds = math.nan
        if not 0 < milliseconds <= MAX_MILLISECONDS:
            raise InvalidRequest(
                f"{name}={headers[name]!r} is not a positive number of milliseconds", field=name
            )
    return None if milliseconds is None else milliseconds / 1000


def _chat_max_tokens(body: ChatCompletionRequest) -> tuple[int | None, str]:
    if body.max_completion_tokens is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequest(
            "'max_tokens' and 'max_completion_tokens' name different numbers", field="max_tokens"
        )
    return body.max_completion_tokens, "max_completion_tokens"


def _within(max_tokens: int | None, room: int, field: str, model: ServedModel) -> int:
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"{max_tokens} output tokens do not fit: the prompt leaves {room} of the "
            f"{model.max_model_len} tokens of the context",
            field=field,
        )
    return max_tokens


def _sampling(
    body: GenerationBody, model: ServedModel, max_tokens: int, num_logprobs: int | None
) -> Callable[[int], SamplingParams]:
    """The parameters of a prompt's choices, but for their seed."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens={min_tokens} is more than the {max_tokens} that may be generated",
            field="min_tokens",
        )
    stop_token_ids = tuple(body.stop_token_ids or ())
    for position, token_id in enumerate(stop_token_ids):
        check_in_vocabulary(token_id, model, f"stop_token_ids[{position}]")
    logit_bias = body.logit_bias or {}
    for token_id in logit_bias:
        check_in_vocabulary(token_id, model, "logit_bias")
    top_p = 1.0 if body.top_p is None else body.top_p
    top_k = body.top_k if body.top_k and 0 < body.top_k < model.vocab_size else None
    if top_p == 0:
        top_p, top_k = 1.0, 1  # the smallest set of tokens is the most likely one
    return lambda seed: SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=body.min_p or 0.0,
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=num_logprobs,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(sorted(item for item in logit_bias.items() if item[1] != 0.0)),
    )


def _stop_strings(body: GenerationBody) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    if isinstance(body.stop, str):
        return (body.stop,)
    for position, stop in enumerate(body.stop):
        if stop in body.stop[:position]:
            raise InvalidRequest(f"{stop!r} is there twice", field=f"stop[{position}]")
    return tuple(body.stop)


def _check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream' to be true", field="stream_options")
