"""Devices that hold one stage of a model together, each a share of every layer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """The devices of a tensor-parallel group by rank; one device is a group of size 1.

    ``devices`` are names as torch has them (``cpu``, ``cuda:1``), none of them twice. Rank ``r``
    has the ``head_range`` of each layer's KV, which is a contiguous piece of every block: what a
    group exports goes to one of another size head range by head range.
    """

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what is no group."""
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices {self.devices}: at least one, and none twice")

    @property
    def size(self) -> int:
        """How many devices there are."""
        return len(self.devices)

    def head_range(self, rank: int, num_kv_heads: int) -> tuple[int, int]:
        """KV heads ``[lo, hi)`` of ``rank`` in a layer that has ``num_kv_heads``.

        Raises ``ValueError`` for a rank that is not there and heads that do not come out even.
        """
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of {self.size}")
        if num_kv_heads % self.size:
            raise ValueError(f"{num_kv_heads} KV heads over {self.size} devices")
        share = num_kv_heads // self.size
        return rank * share, (rank + 1) * share
