"""A model's chat template: messages to the prompt text it was trained on.

Templates come with models, so they run in jinja2's immutable sandbox, with the settings, filters
and functions that transformers gives them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.gateway.tokenizer import read_tokenizer_config
from shared.errors import ConfigError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"

_DEFAULT = "default"


def local_now() -> datetime:
    """The wall clock where this process runs, as templates that print a date expect."""
    return datetime.now().astimezone()


class ChatTemplate:
    """A compiled template; rendering may happen in any thread."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str | list[str]],
        now: Callable[[], datetime] = local_now,
    ) -> None:
        """``special_tokens`` are the template's ``bos_token`` and the like.

        Raises ``ConfigError`` if ``source`` is no jinja2 template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        # The class itself would be a way to more than making one.
        environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    @classmethod
    def from_model_dir(
        cls,
        path: Path,
        *,
        special_tokens: Mapping[str, str | list[str]],
        now: Callable[[], datetime] = local_now,
    ) -> "ChatTemplate | None":
        """The template of the model in ``path``, ``None`` if it has none.

        ``chat_template.jinja`` comes before ``tokenizer_config.json``; of named ones, ``default``
        is taken. Raises ``ConfigError`` naming the file.
        """
        file = path / TEMPLATE_FILE
        if file.is_file():
            source: Any = file.read_text(encoding="utf-8")
        else:
            file = path / "tokenizer_config.json"
            source = read_tokenizer_config(path).get("chat_template")
        if isinstance(source, list):
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        if isinstance(source, dict):
            source = source.get(_DEFAULT)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ConfigError(f"{file}: chat_template={source!r} is not text")
        try:
            return cls(source, special_tokens=special_tokens, now=now)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of ``messages`` (role and content each), special tokens included.

        A ``developer`` message becomes a ``system`` one unless the template knows the role.
        ``variables`` are the caller's own and cannot replace what the template is given anyway.
        Raises ``InvalidRequest`` if the template refuses the messages or fails on them.
        """
        given: dict[str, Any] = {
            **self._special_tokens,
            "messages": [self._message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        for name in variables or {}:
            if name in given:
                raise InvalidRequest(
                    f"{name!r} is set by the server", field=f"chat_template_kwargs.{name}"
                )
        try:
            return self._template.render({**(variables or {}), **given})
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        except Exception as error:  # a template is a program and may fail in any way
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {error}", field="messages"
            ) from error

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message.get("role") == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return dict(message)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the model said, for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The body of the block, with its own scope."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
