"""What the edge knows of a model: its name, limits, tokenizer and chat template."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from services.gateway.chat_template import ChatTemplate, local_now
from services.gateway.tokenizer import Tokenizer
from shared.errors import ConfigError

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model that clients can name.

    ``max_model_len`` counts prompt and output tokens together; ``vocab_size`` is the number of
    rows of the embedding. ``created_s`` is Unix time. ``chat_template`` is ``None`` for a model
    that only completes text.
    """

    name: str
    max_model_len: int
    vocab_size: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    created_s: int
    fingerprint: str | None = None

    @classmethod
    def from_model_dir(
        cls,
        path: Path,
        *,
        name: str,
        max_model_len: int | None = None,
        fingerprint: str | None = None,
        now: Callable[[], datetime] = local_now,
    ) -> "ServedModel":
        """Read the model in ``path``; ``max_model_len`` may shorten the context it was made for.

        Raises ``ConfigError`` naming the file that is missing or wrong.
        """
        config = _text_config(path / "config.json")
        tokenizer = Tokenizer.from_model_dir(path)
        return cls(
            name=name,
            max_model_len=_context(config, max_model_len, path),
            vocab_size=_positive(config, "vocab_size", path),
            tokenizer=tokenizer,
            chat_template=ChatTemplate.from_model_dir(
                path, special_tokens=tokenizer.special_tokens, now=now
            ),
            created_s=int(now().timestamp()),
            fingerprint=fingerprint,
        )


def _text_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _context(config: dict[str, Any], wanted: int | None, path: Path) -> int:
    key = next((key for key in _CONTEXT_KEYS if key in config), _CONTEXT_KEYS[0])
    if wanted is not None and key not in config:
        return wanted
    longest = _positive(config, key, path)
    if wanted is not None and wanted > longest:
        raise ConfigError(f"max_model_len={wanted}: the model's {key} is {longest}")
    return longest if wanted is None else wanted


def _positive(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path / 'config.json'}: {key}={value!r} is not a positive number")
    return value
