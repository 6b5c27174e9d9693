"""Batching policies: which waiting requests are prefilled next, together, and in what order.

``create_policy`` makes one by the name users type after ``--policy``.
"""

from shared.core.policies.base import (
    Capacity,
    Policy,
    PrefillBatch,
    PrefillSlot,
    QueuedRequest,
)
from shared.core.policies.registry import POLICIES, create_policy

__all__ = [
    "POLICIES",
    "Capacity",
    "Policy",
    "PrefillBatch",
    "PrefillSlot",
    "QueuedRequest",
    "create_policy",
]
