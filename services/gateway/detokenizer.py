"""Tokens to text, one token at a time, so that the pieces add up to the whole decoded text."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer(Protocol):
    """Holds back what the next token could still change; special tokens make no text."""

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes, maybe empty."""
        ...

    def flush(self) -> str:
        """The text held back, as it is when no token follows."""
        ...


class ByteLevelDetokenizer:
    """For byte-level vocabularies, where every token is a run of bytes of the UTF-8 text."""

    def __init__(self, visible_bytes: Callable[[int], bytes]) -> None:
        """``visible_bytes`` gives a token's bytes, none for a special token."""
        self._visible_bytes = visible_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The characters that ``token_id`` completes."""
        return self._utf8.decode(self._visible_bytes(token_id))

    def flush(self) -> str:
        """A replacement character if the text breaks off inside a character."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes the last tokens again with each new one.

    The window begins with tokens whose text is already out, so that what a decoder does to the
    beginning of a text (dropping a space) cannot happen to a token in the middle. It is extended,
    and nothing given out, while the last character is incomplete, or while a run of byte tokens
    (``<0xE4>``) is open: the decoder replaces such a run as a whole if it turns out to be invalid.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_visible: Callable[[int], bool],
        is_byte: Callable[[int], bool],
    ) -> None:
        """``is_visible`` is false for special tokens and for ids without a token."""
        self._decode = decode
        self._is_visible = is_visible
        self._is_byte = is_byte
        self._window: list[int] = []
        self._num_shown_tokens = 0
        self._shown_text = ""

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes."""
        if not self._is_visible(token_id):
            return ""
        self._window.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown_text):
            return ""
        fresh = text[len(self._shown_text) :]
        del self._window[: self._num_shown_tokens]
        self._num_shown_tokens = len(self._window)
        self._shown_text = self._decode(self._window)
        return fresh

    def flush(self) -> str:
        """The text that was held back."""
        text = self._decode(self._window)
        fresh = text[len(self._shown_text) :]
        self._window, self._num_shown_tokens, self._shown_text = [], 0, ""
        return fresh
