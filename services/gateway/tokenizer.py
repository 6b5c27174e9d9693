"""The model's tokenizer: text to token ids and back, without transformers and as transformers."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from services.gateway.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    IncrementalDetokenizer,
    WindowDetokenizer,
)
from shared.errors import ConfigError

THREAD_FROM_CHARS = 2048
"""Text from this length on is encoded in a thread: about a microsecond a character."""


class Tokenizer:
    """``tokenizer.json`` and what ``tokenizer_config.json`` adds to it.

    Which tokens go around a text is what ``tokenizer.json`` says; like transformers, this leaves
    ``add_bos_token`` out of account. Token ids without a token (padding of the embedding) have no
    text. Safe to use from several threads.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any] | None = None) -> None:
        """``config`` is the content of ``tokenizer_config.json``; ``backend`` becomes ours."""
        config = config or {}
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _special_tokens(config)
        _mark_special(backend, self.special_tokens)
        self._backend = backend
        added_tokens = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, t in added_tokens.items() if t.special)
        decoder: dict[str, Any] = json.loads(backend.to_str()).get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        self._has_byte_fallback = "ByteFallback" in json.dumps(decoder)
        self._byte_of_char = _byte_of_char()
        self._token_bytes: dict[int, bytes] = {}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._longest_token_bytes = max(map(len, vocabulary), default=0)
        # Where nothing is dropped before encoding, a text has at least length / longest tokens.
        self._keeps_all_text = backend.normalizer is None and not any(
            t.lstrip or t.rstrip for t in added_tokens.values()
        )
        self._anchor = backend.encode("a", add_special_tokens=False).ids

    @classmethod
    def from_model_dir(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of the model in ``path``; raises ``ConfigError`` naming the file."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; only models with one can be served")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{file}: not a tokenizer: {error}") from error
        return cls(backend, read_tokenizer_config(path))

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of ``text``; long text is encoded in a thread."""
        if len(text) < THREAD_FROM_CHARS:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of ``text``, computed by the calling thread."""
        # The "fast" variant leaves out the character offsets, a third of the time.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def min_tokens(self, text: str) -> int:
        """A lower bound of the tokens of ``text``, without encoding it; 0 where none is known."""
        if not self._is_byte_level or not self._keeps_all_text or not self._longest_token_bytes:
            return 0
        return len(text) // self._longest_token_bytes

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text of ``token_ids``, special tokens left out."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A new one, for one output."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._visible_bytes)
        return WindowDetokenizer(self.decode, self._is_visible, self._is_byte)

    def token_bytes(self, token_id: int) -> bytes:
        """What ``token_id`` adds to the text, as UTF-8 bytes; special tokens as they are written.

        Single tokens may be no valid UTF-8; those of a whole output are.
        """
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""The token for people: its text, or ``bytes:\xe4\xbd`` where it is not whole text."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def _is_visible(self, token_id: int) -> bool:
        is_special = token_id in self._special_ids
        return not is_special and self._backend.id_to_token(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        return self._has_byte_fallback and self._fallback_byte(token_id) is not None

    def _fallback_byte(self, token_id: int) -> int | None:
        token = self._backend.id_to_token(token_id)
        if token is None or len(token) != 6 or token[:3] != "<0x" or token[5] != ">":
            return None
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self._is_byte_level:
            data = [self._byte_of_char.get(character) for character in token]
            known = [byte for byte in data if byte is not None]
            # The decoder takes a token with any other character as it is written.
            return bytes(known) if len(known) == len(data) else token.encode()
        if self._has_byte_fallback:
            byte = self._fallback_byte(token_id)
            if byte is not None:
                return bytes([byte])
        # After another token: the first of a text may lose its space.
        before, both = self.decode(self._anchor), self.decode([*self._anchor, token_id])
        text = both[len(before) :] if both.startswith(before) else self.decode([token_id])
        return text.replace(REPLACEMENT, "").encode()


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of the model in ``path``; empty where there is none."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The special tokens by their role, as chat templates know them."""
    tokens: dict[str, str | list[str]] = {}
    for role, token in config.items():
        if role.endswith("_token") and (text := _token_text(token)) is not None:
            tokens[role] = text
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        tokens |= {role: text for role, t in extra.items() if (text := _token_text(t)) is not None}
    else:
        tokens["additional_special_tokens"] = [
            text for token in extra if (text := _token_text(token)) is not None
        ]
    return tokens


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _mark_special(backend: Backend, special_tokens: Mapping[str, str | list[str]]) -> None:
    """Have the tokens that the configuration calls special treated so, if they exist at all."""
    names = [n for t in special_tokens.values() for n in ([t] if isinstance(t, str) else t)]
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in names
            if name not in known and backend.token_to_id(name) is not None
        ]
    )


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes follow in order from U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(0x100 + offset): byte for offset, byte in enumerate(others)}
