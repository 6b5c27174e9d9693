"""What does not fit is an error at start that names the numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.engine.config import EngineConfig
from shared.errors import ConfigError, OutOfMemory
from shared.kvcache.sizing import device_memory_bytes
from tests.engines import make_engine
from tests.models import FAMILIES, write_model

TOTAL_BYTES = device_memory_bytes(torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": TOTAL_BYTES // 1000},
        {"num_blocks": None, "kv_cache_bytes": 2 * TOTAL_BYTES},
        {"num_blocks": 4, "swap_bytes": TOTAL_BYTES},
    ],
)
def test_more_memory_than_there_is(model: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(OutOfMemory, match=str(TOTAL_BYTES)):
        make_engine(model, **settings)


@pytest.mark.parametrize(
    ("key", "value"), [("batching", "greedy"), ("swap_bytes", -1), ("migration_reserve", 1.0)]
)
def test_settings_that_mean_nothing_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value!r}"):
        EngineConfig(model_path="anywhere", **{key: value})


def test_a_share_of_the_memory_too_small_for_the_weights(model: Path) -> None:
    with pytest.raises(OutOfMemory, match=rf"0\.00 of {TOTAL_BYTES} bytes less \d+ of weights"):
        make_engine(model, num_blocks=None, memory_fraction=1e-9)


def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    with (path / "more.safetensors").open("wb") as file:
        file.truncate(TOTAL_BYTES + 1)  # a hole: it takes no room on the disk
    with pytest.raises(
        OutOfMemory, match=rf"the weights in .* are \d+ bytes; cpu has {TOTAL_BYTES}"
    ):
        make_engine(path)
