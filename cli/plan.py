"""From what the user asked for and what the machine has to the processes to start. No I/O."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.supervision import Slot
from shared.errors import ConfigError

WORKER_ROLES = ("prefill", "decode")
CPU_MEMORY_FRACTION = 0.5
GPU_MEMORY_FRACTION = 0.9
"""Share of a device's memory for all workers on it together."""
DRAIN_TIMEOUT_S = 10.0
"""How long answers under way go on after Ctrl-C; somebody is waiting at the terminal."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the machine offers: CPU cores that may be used, and CUDA devices as CUDA names them."""

    num_cores: int
    cuda_devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What ``banyan up`` was asked for. ``counts`` says how many processes of each role.

    ``memory_fraction`` is the share of each device's memory for all workers on it together;
    ``None`` means 0.9 of a GPU and 0.5 of the host.
    """

    model_dir: Path
    served_model_name: str
    counts: Mapping[str, int]
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    memory_fraction: float | None = None
    max_model_len: int | None = None
    policy: str | None = None
    transport: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    json_logs: bool = False

    def gateway_ports(self) -> tuple[int, ...]:
        """The ports of the gateways: ``port`` and those after it."""
        return tuple(range(self.port, self.port + self.counts.get("gateway", 0)))


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """What to run in a slot. ``environ`` is what the user asked for, ``defaults`` what follows.

    A variable that the user has set stands between the two.
    """

    slot: Slot
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the process, given that of this one."""
        return {**self.defaults, **inherited, **self.environ}


def plan_suite(options: UpOptions, hardware: Hardware) -> tuple[ProcessSpec, ...]:
    """The processes of the suite, the bus apart.

    Raises ``ConfigError`` if they cannot serve anybody, or a CUDA device was asked for and there is
    none.
    """
    _check(options, hardware)
    slots = [Slot(role, index) for role, count in options.counts.items() for index in range(count)]
    shares = _share_devices(
        [slot for slot in slots if slot.role in WORKER_ROLES],
        hardware.cuda_devices if uses_cuda(options, hardware) else (),
    )
    num_threads = max(1, hardware.num_cores // max(1, len(shares)))
    return tuple(
        ProcessSpec(
            slot=slot,
            command=(sys.executable, "-m", f"services.{slot.role}"),
            environ=_as_text(_asked_for(options, slot, shares.get(slot))),
            defaults=_as_text(_following(slot, shares.get(slot), num_threads)),
        )
        for slot in slots
    )


def uses_cuda(options: UpOptions, hardware: Hardware) -> bool:
    """Whether the workers run on CUDA devices."""
    return options.device == "cuda" or (options.device == "auto" and bool(hardware.cuda_devices))


def _check(options: UpOptions, hardware: Hardware) -> None:
    for role in ("gateway", "scheduler"):
        if options.counts.get(role, 0) < 1:
            raise ConfigError(f"--{role}=0: nothing works without a {role}")
    if not any(options.counts.get(role, 0) for role in WORKER_ROLES):
        raise ConfigError("--prefill=0 --decode=0: at least one worker is needed")
    if options.device == "cuda" and not hardware.cuda_devices:
        raise ConfigError(
            "--device=cuda: there is no CUDA device, or this torch has no CUDA; "
            "take --device cpu, or install a torch with CUDA"
        )


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a worker gets: a CUDA device (or the CPU), with so many workers on it in all."""

    cuda_device: str | None
    num_sharing: int

    def of(self, fraction: float) -> str:
        """The worker's part of ``fraction``."""
        return f"{fraction / self.num_sharing:.4f}"


def _share_devices(workers: Sequence[Slot], cuda_devices: Sequence[str]) -> dict[Slot, _Share]:
    """Workers go round the devices; without any they share the CPU."""
    devices: Sequence[str | None] = cuda_devices or (None,)
    return {
        worker: _Share(
            cuda_device=devices[number % len(devices)],
            num_sharing=len(range(number % len(devices), len(workers), len(devices))),
        )
        for number, worker in enumerate(workers)
    }


def _asked_for(options: UpOptions, slot: Slot, share: _Share | None) -> dict[str, object]:
    """What the options say about the process in ``slot``."""
    own = f"BANYAN_{slot.role.upper()}_"
    values: dict[str, object] = {
        "BANYAN_MODEL": options.model_dir,
        "BANYAN_SERVED_MODEL_NAME": options.served_model_name,
    }
    if options.json_logs:
        values["BANYAN_LOG_JSON"] = "true"
    if slot.role == "gateway":
        values[f"{own}HOST"] = options.host
        values[f"{own}PORT"] = options.gateway_ports()[slot.index]
    if slot.role == "scheduler" and options.policy is not None:
        values[f"{own}POLICY"] = options.policy
    if slot.role in (*WORKER_ROLES, "gateway") and options.max_model_len is not None:
        values[f"{own}MAX_MODEL_LEN"] = options.max_model_len
    if slot.role in (*WORKER_ROLES, "kvstore") and options.transport != "auto":
        values[f"{own}TRANSPORT"] = options.transport
    if share is not None:
        if share.cuda_device is not None:
            values["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            values["CUDA_VISIBLE_DEVICES"] = share.cuda_device
        if options.device != "auto":
            values[f"{own}DEVICE"] = options.device
        if options.dtype != "auto":
            values[f"{own}DTYPE"] = options.dtype
        if options.quantization is not None:
            values[f"{own}QUANTIZATION"] = options.quantization
        if options.kv_cache_dtype != "auto":
            values[f"{own}KV_CACHE_DTYPE"] = options.kv_cache_dtype
        if options.memory_fraction is not None:
            values[f"{own}MEMORY_FRACTION"] = share.of(options.memory_fraction)
    return values


def _following(slot: Slot, share: _Share | None, num_threads: int) -> dict[str, object]:
    """What follows from how many processes share which machine."""
    values: dict[str, object] = {
        "BANYAN_LOG_JSON": "false",
        "BANYAN_DRAIN_TIMEOUT_S": DRAIN_TIMEOUT_S,
    }
    if share is not None:
        own = f"BANYAN_{slot.role.upper()}_"
        if share.cuda_device is not None:
            values[f"{own}DEVICE"] = "cuda"
            values[f"{own}MEMORY_FRACTION"] = share.of(GPU_MEMORY_FRACTION)
        else:
            values[f"{own}DEVICE"] = "cpu"
            values[f"{own}MEMORY_FRACTION"] = share.of(CPU_MEMORY_FRACTION)
            # Two workers that each take all cores are five times slower than with half of them.
            values[f"{own}NUM_THREADS"] = num_threads
            values["OMP_NUM_THREADS"] = num_threads
    return values


def _as_text(values: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
