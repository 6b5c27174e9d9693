"""What the placer knows of the workers, and the placement that follows from it. Pure.

A worker's devices, layers and sizes come from its load reports. What changes from report to report
(load, free blocks) is no part of the topology; ``version`` grows when anything else does.
"""

from dataclasses import dataclass

from shared.core.membership import Membership
from shared.messages.load import WorkerReport
from shared.messages.placement import DeviceReport, Placement, Stage


@dataclass(frozen=True, slots=True)
class _Member:
    model: str
    device: DeviceReport


class Topology:
    """Live workers by what they run on; told the time.

    ``first_version`` is the version before any worker is known: a placer that comes after another
    has to begin above what that one gave out.
    """

    def __init__(self, *, ttl_s: float, first_version: int = 0) -> None:
        self.membership = Membership(ttl_s=ttl_s)
        self.version = first_version
        self._members: dict[str, _Member] = {}

    def __len__(self) -> int:
        """Workers that are alive."""
        return len(self._members)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that live workers serve, sorted."""
        return tuple(sorted({member.model for member in self._members.values()}))

    def on_report(self, report: WorkerReport, now_s: float) -> bool:
        """Take a report; returns whether it changed the topology. An outdated one changes nothing.

        A worker that drains stays: it runs its layers until it is gone.
        """
        if self.membership.on_report(report.instance, report.sequence, now_s) is None:
            return False
        member = _Member(report.model, _device_of(report))
        if self._members.get(report.instance) == member:
            return False
        self._members[report.instance] = member
        self.version += 1
        return True

    def remove(self, instance: str) -> bool:
        """The worker is known to be gone; returns whether that changed the topology."""
        self.membership.remove(instance)
        if self._members.pop(instance, None) is None:
            return False
        self.version += 1
        return True

    def expired(self, now_s: float) -> list[str]:
        """Remove and return the workers that fell silent; call it several times a TTL."""
        return [name for name in self.membership.expired(now_s) if self.remove(name)]

    def placement(self, model: str) -> Placement:
        """Every live worker of ``model`` is a chain of one stage that runs all layers.

        Sorted by instance. A worker that does not say how many layers it runs is listed among the
        devices and is in no chain.
        """
        devices = tuple(
            member.device for _, member in sorted(self._members.items()) if member.model == model
        )
        chains = tuple(
            (Stage(instance=device.instance, lo=0, hi=device.num_layers),)
            for device in devices
            if device.num_layers > 0
        )
        return Placement(
            model=model,
            placement_version=self.version,
            devices=devices,
            chains=chains,
            reason=_reason(model, len(devices), len(chains)),
        )


def _device_of(report: WorkerReport) -> DeviceReport:
    return DeviceReport(
        instance=report.instance,
        role=report.role,
        device=report.device,
        num_layers=report.num_layers,
        param_bytes=report.param_bytes,
        kv_capacity_tokens=report.num_blocks * report.block_size,
    )


def _reason(model: str, num_devices: int, num_chains: int) -> str:
    if num_devices == 0:
        return f"no live worker serves {model}"
    reason = f"each of {num_chains} live workers runs the whole model"
    unknown = num_devices - num_chains
    return reason if unknown == 0 else f"{reason}; {unknown} more do not say how many layers"
