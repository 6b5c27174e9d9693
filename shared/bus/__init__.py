"""The control plane: request/reply, publish/subscribe, leases and leader election.

The two implementations are imported from their modules: ``shared.bus.nats.NatsBus`` and
``shared.bus.memory.MemoryBus``; the real server that tests and a laptop start themselves is
``shared.bus.server.EmbeddedNats``.
"""

from shared.bus.base import Bus, Handler, ReconnectListener, Responder, Subscription
from shared.bus.leader import LeaderElection
from shared.bus.leases import Lease, LeaseChange, LeaseEvent, LeaseStore, LeaseWatch, lease_bucket

__all__ = [
    "Bus",
    "Handler",
    "LeaderElection",
    "Lease",
    "LeaseChange",
    "LeaseEvent",
    "LeaseStore",
    "LeaseWatch",
    "ReconnectListener",
    "Responder",
    "Subscription",
    "lease_bucket",
]
