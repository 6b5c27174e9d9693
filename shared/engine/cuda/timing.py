"""How long something takes on a GPU."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

NUM_WARM_UPS = 3
NUM_REPEATS = 15
FLUSHED_BYTES = 256 << 20
"""Written before each run, which puts whatever else was there out of the caches."""


def fastest(candidates: Sequence[Callable[[], object]], device: torch.device) -> int:
    """Index of the candidate with the least median time, the first one where there is no GPU."""
    if device.type != "cuda" or len(candidates) == 1:
        return 0
    times_ms = [median_ms(run, device) for run in candidates]
    return times_ms.index(min(times_ms))


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median time of ``run`` on the device, with cold caches; waits for the device."""
    with torch.cuda.device(device):
        filler = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
        events: list[tuple[Any, Any]] = []
        for _ in range(NUM_WARM_UPS):
            run()
        for _ in range(NUM_REPEATS):
            filler.zero_()
            start, end = _event(), _event()
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in events)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
