"""Policies by the names users type."""

from shared.core.policies.base import Policy
from shared.core.policies.fifo import FifoPolicy
from shared.errors import ConfigError

POLICIES: dict[str, type[Policy]] = {FifoPolicy.name: FifoPolicy}


def create_policy(name: str) -> Policy:
    """A fresh policy called ``name``; raises ``ConfigError`` naming those that exist."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}")
    return policy()
