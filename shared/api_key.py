"""The text of an API key: ``bn-<id>-<secret>``.

The id (12 hexadecimal digits) is public: it finds the key in the database, and may be listed and
logged. The secret (43 letters and digits, 256 bits) is shown once and stored only as its SHA-256.
A slow password hash would add nothing: it makes guessing what people choose expensive, and 256
random bits cannot be guessed at any speed; what is checked with every request has to be cheap.

The form is fixed so that a key can be recognised wherever it turns up, and taken out of there.
"""

import hashlib
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Self

PREFIX = "bn-"

_ID_BYTES = 6
_SECRET_LENGTH = 43
_SECRET_ALPHABET = string.ascii_letters + string.digits

_KEY = re.compile(rf"{PREFIX}([0-9a-f]{{{_ID_BYTES * 2}}})-([A-Za-z0-9]{{{_SECRET_LENGTH}}})")
_SECRET_IN_TEXT = re.compile(rf"({PREFIX}[0-9a-f]{{{_ID_BYTES * 2}}}-)[A-Za-z0-9]+")
"""Cut off or with more behind it, a secret is taken out too."""


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key as its holder has it. Its ``repr`` does not show the secret."""

    id: str
    secret: str = field(repr=False)

    @classmethod
    def random(cls) -> Self:
        """A new key, from the system's source of randomness."""
        secret = "".join(secrets.choice(_SECRET_ALPHABET) for _ in range(_SECRET_LENGTH))
        return cls(id=secrets.token_hex(_ID_BYTES), secret=secret)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """``text`` as a key, or ``None`` if it has not the form of one."""
        match = _KEY.fullmatch(text)
        return None if match is None else cls(id=match[1], secret=match[2])

    @property
    def text(self) -> str:
        """What the client sends."""
        return f"{PREFIX}{self.id}-{self.secret}"

    def digest(self) -> bytes:
        """SHA-256 of the secret, 32 bytes: what is stored."""
        return hashlib.sha256(self.secret.encode()).digest()


def without_secrets(text: str) -> str:
    """``text`` with the secret of every API key in it replaced by stars."""
    return _SECRET_IN_TEXT.sub(r"\1***", text) if PREFIX in text else text
