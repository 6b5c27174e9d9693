"""Which device of a group has which KV heads."""

import pytest

from shared.core.device_group import DeviceGroup
from shared.engine.config import EngineConfig
from shared.errors import ConfigError


def test_ranks_share_the_heads_out_in_order() -> None:
    group = DeviceGroup(("cuda:0", "cuda:1", "cuda:3"))
    assert group.size == 3
    assert [group.head_range(rank, 6) for rank in range(3)] == [(0, 2), (2, 4), (4, 6)]
    assert DeviceGroup(("cpu",)).head_range(0, 5) == (0, 5)


def test_what_cannot_be_shared_out_is_refused() -> None:
    group = DeviceGroup(("cuda:0", "cuda:1"))
    for rank, num_kv_heads, what in ((2, 4, "rank 2 of 2"), (-1, 4, "rank -1"), (0, 3, "3 KV")):
        with pytest.raises(ValueError, match=what):
            group.head_range(rank, num_kv_heads)
    for devices in ((), ("cpu", "cpu")):
        with pytest.raises(ValueError, match="devices"):
            DeviceGroup(devices)


@pytest.mark.parametrize("size", [0, 2])
def test_an_engine_on_several_devices_is_refused_by_the_settings_name(size: int) -> None:
    with pytest.raises(ConfigError, match=f"tp={size}: must be 1"):
        EngineConfig(model_path="", tp=size)
