"""What every instance says of itself, again and again; whoever falls silent is taken for dead."""

from enum import StrEnum

import msgspec

from shared.core.latency_model import LatencyModel
from shared.messages.base import Message


class InstanceState(StrEnum):
    """Whether an instance takes work."""

    READY = "ready"
    DRAINING = "draining"


class WorkerReport(Message, frozen=True, kw_only=True):
    """The load of one prefill or decode instance.

    Publisher: the worker, every 100 ms. Subscribers: scheduler, placer, dashboards, on
    ``load.<role>.<instance>``. Delivery: core. Idempotency key: ``(instance, sequence)``; an older
    ``sequence`` is dropped. ``instance`` is unique to one run of the process.
    ``compute_utilisation`` is the engine's busy share of the last period (0..1), ``step_s`` the
    mean time of an iteration in it, ``layer_s`` that of one layer. ``latency`` predicts this
    instance's times, refitted by its own steps; it is missing until there is a profile or enough
    steps were seen. ``latency_error`` is the mean relative error of its late predictions.
    """

    role: str
    instance: str
    sequence: int
    state: InstanceState
    model: str
    kv_layout: str
    max_model_len: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    compute_utilisation: float
    tokens_per_s: float
    step_s: float
    layer_s: float
    num_stale_dropped: int = 0
    num_quarantined: int = 0
    num_preemptions: int = 0
    transport: str = ""
    device: str = ""
    dtype: str = ""
    num_layers: int = 0
    kv_bytes_per_token: int = 0
    param_bytes: int = 0
    latency: LatencyModel | None = None
    latency_error: float | None = None


class ServiceReport(Message, frozen=True, kw_only=True):
    """The load of any other instance: gateway, scheduler, predictor, kvstore, placer.

    Publisher: the service, every 500 ms. Subscribers: scheduler, placer, dashboards, and workers
    (for stores), on ``load.<role>.<instance>``. Delivery: core. Idempotency key:
    ``(instance, sequence)``. ``gauges`` are that role's own numbers by name.
    """

    role: str
    instance: str
    sequence: int
    state: InstanceState
    model: str = ""
    gauges: dict[str, float] = msgspec.field(default_factory=dict)
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class InstanceExited(Message, frozen=True, kw_only=True):
    """An instance is gone for good; nobody need wait for its silence.

    Publisher: the instance itself as it closes, or the supervisor that saw its process end.
    Subscribers: those of the reports, on ``load.<role>.<instance>``. Delivery: core, a hint.
    Idempotency key: ``instance``. ``exit_code`` is known to a supervisor only; negative, it is the
    signal that ended the process.
    """

    role: str
    instance: str
    exit_code: int | None = None


class Drain(Message, frozen=True, kw_only=True):
    """Take nothing new, finish or hand over what there is, then exit.

    Publisher: the CLI or the leader. Subscriber: one service, on ``control.<instance>.drain``.
    Delivery: request/reply with ``Done`` (draining has begun). Idempotent.
    """

    reason: str
