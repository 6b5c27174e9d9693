"""Names that a bus and the server's permissions must agree on."""

import re

from shared.errors import ConfigError

_USER = re.compile(r"[-_a-zA-Z0-9]+")


def inbox_prefix(user: str | None) -> str:
    """The first token of all reply subjects of ``user``; nobody else may listen there.

    Raises ``ConfigError`` if the name of the user cannot be part of a subject.
    """
    if user is None:
        return "_INBOX"
    if not _USER.fullmatch(user):
        raise ConfigError(f"not a name for a NATS user: {user!r} (use letters, digits, - and _)")
    return f"_INBOX_{user}"
