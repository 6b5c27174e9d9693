"""Fields of other servers and of the OpenAI API that would change the answer, but cannot here.

Each is accepted when it holds a value that asks for nothing, and refused by name otherwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from shared.errors import InvalidRequest

Neutral = Mapping[str, Sequence[Any]]
"""The values, besides ``null``, with which a field asks for nothing."""

_COMMON: Final[Neutral] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default"),
}

CHAT: Final[Neutral] = {
    **_COMMON,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}

COMPLETION: Final[Neutral] = {
    **_COMMON,
    "suffix": ("",),
    "prompt_embeds": (),
    "add_special_tokens": (True,),
}

MESSAGE: Final[Neutral] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "prefix": (False,),
}


def refuse_unsupported(
    fields: Mapping[str, Any] | None, neutral: Neutral, *, path: str = ""
) -> None:
    """Raise ``InvalidRequest`` for the first of ``fields`` that asks for what cannot be done.

    ``path`` goes before the field's name in the error.
    """
    for name, value in (fields or {}).items():
        if value is None or name not in neutral or any(_same(value, n) for n in neutral[name]):
            continue
        accepted = " or ".join(map(repr, neutral[name])) or "null"
        raise InvalidRequest(
            f"{name!r} is not supported by this server (accepted: {accepted})",
            field=path + name,
            code="unsupported_parameter",
        )


def _same(value: Any, neutral: Any) -> bool:
    """Equality in which ``true`` is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
