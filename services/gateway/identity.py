"""Who asks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A tenant, and the id of the key it came with; without one it is the tenant without a name."""

    tenant: str = ""
    key_id: str | None = None


Authenticate = Callable[[str | None], Awaitable[Identity]]
"""From the bearer token, or ``None``, to who asks. Raises ``AuthenticationFailed``, and ``Refused``
when that cannot be told now."""


async def let_everybody_in(_token: str | None) -> Identity:
    """For a gateway without keys."""
    return Identity()
