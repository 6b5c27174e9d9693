"""Between the placer and whoever asks where layers belong."""

import msgspec

from shared.messages.base import Message


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device that a worker runs on, as the placer has seen it in load reports."""

    instance: str
    role: str
    device: str
    num_layers: int
    param_bytes: int
    kv_capacity_tokens: int


class Stage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Layers ``[lo, hi)`` of the model on one instance."""

    instance: str
    lo: int
    hi: int


class GetPlacement(Message, frozen=True, kw_only=True):
    """Where are the layers?

    Publisher: the CLI or the scheduler. Subscriber: one placer (queue group), on ``placement``.
    Delivery: request/reply. Idempotent.
    """

    model: str


class Placement(Message, frozen=True, kw_only=True):
    """Which layers each instance runs, and the topology this follows from.

    Publisher: the placer. Subscriber: the asker. Delivery: reply. Idempotency key:
    ``placement_version``, which grows with every change of the topology.
    """

    model: str
    placement_version: int
    devices: tuple[DeviceReport, ...]
    chains: tuple[tuple[Stage, ...], ...]
    reason: str
