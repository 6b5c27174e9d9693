"""What the machine can do, measured: how fast it reads memory and multiplies matrices.

    python -m bench.machine [--model DIR] [--device cpu|cuda] [--num-threads N]

Every probe runs with all of torch's threads. A rate is the best that any probe reached in any
repeat: the floor it gives must not be one that a better program could fall below.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from bench.idleness import Idleness
from bench.roofline import MachineRates

BUFFER_BYTES = {"cpu": 1 << 29, "cuda": 4 << 30}
"""Well past any cache."""
MIN_REPEATS = 3
PROBE_S = 0.4
NUM_ROWS = (512, 2048)
SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True, slots=True)
class Probe:
    """Something to run and what one run of it reads, or computes."""

    name: str
    work: float
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """The rates, and each probe's best by its name."""

    rates: MachineRates
    bytes_per_s: dict[str, float]
    flops_per_s: dict[str, float]
    cores_busy_elsewhere: float | None

    def report(self) -> dict[str, object]:
        """As it goes into the JSON."""
        return {
            "read_bytes_per_s": self.rates.read_bytes_per_s,
            "flops_per_s": self.rates.flops_per_s,
            "cores_busy_elsewhere": self.cores_busy_elsewhere,
            "read_probes": self.bytes_per_s,
            "arithmetic_probes": self.flops_per_s,
        }


def measure_machine(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]
) -> Measured:
    """Rates for weights of ``dtype`` and linear maps of ``shapes`` (outputs, inputs).

    On a CPU arithmetic counts in fp32 too, because an engine may widen weights where that is
    faster. Takes some seconds and two buffers of ``BUFFER_BYTES``.
    """
    idleness = Idleness()
    with torch.inference_mode():
        bandwidth = _best(_read_probes(device, dtype), device)
        arithmetic = _best(_matmul_probes(device, dtype, shapes), device)
    return Measured(
        rates=MachineRates(max(bandwidth.values()), max(arithmetic.values())),
        bytes_per_s=bandwidth,
        flops_per_s=arithmetic,
        cores_busy_elsewhere=idleness.cores_busy_elsewhere(),
    )


def linear_shapes(model: str) -> list[tuple[int, int]]:
    """``(outputs, inputs)`` of a model's main linear maps."""
    config = AutoConfig.from_pretrained(Path(model))
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * hidden)
    return [(hidden, hidden), (wide, hidden), (hidden, wide)]


def _read_probes(device: torch.device, dtype: torch.dtype) -> Iterator[Probe]:
    size_bytes = BUFFER_BYTES[device.type]
    columns = 4096
    # Bounded values: neither a denormal nor an infinity may slow a sum down.
    floats = torch.ones(size_bytes // 4 // columns, columns, device=device)
    vector = torch.ones(columns, device=device)
    yield Probe("sum fp32", size_bytes, floats.sum)
    yield Probe("max fp32", size_bytes, floats.max)
    yield Probe("matrix-vector fp32", size_bytes, lambda: floats @ vector)
    half = floats[: floats.shape[0] // 2].view(-1)
    other = floats[floats.shape[0] // 2 :].view(-1)
    yield Probe("dot fp32", size_bytes, lambda: torch.dot(half, other))
    yield Probe("copy", size_bytes, lambda: half.copy_(other))
    if dtype != torch.float32:
        weights = floats.view(dtype).view(-1, columns).fill_(1.0)
        rows = torch.ones(16, columns, device=device, dtype=dtype)
        yield Probe(f"sum {dtype}", size_bytes, weights.sum)
        yield Probe(f"matrix-vector {dtype}", size_bytes, lambda: weights @ rows[0])
        yield Probe(
            f"linear of 16 rows {dtype}", size_bytes, lambda: functional.linear(rows, weights)
        )


def _matmul_probes(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]
) -> Iterator[Probe]:
    dtypes = [dtype, torch.float32] if device.type == "cpu" else [dtype]
    sizes = [(rows, *shape) for shape in shapes for rows in NUM_ROWS]
    sizes += [(n, n, n) for n in SQUARES[device.type]]
    for kind in dict.fromkeys(dtypes):
        for rows, outputs, inputs in dict.fromkeys(sizes):
            left = torch.randn(rows, inputs, device=device).to(kind)
            right = torch.randn(outputs, inputs, device=device).to(kind)
            yield _matmul_probe(left, right)


def _matmul_probe(left: Tensor, right: Tensor) -> Probe:
    (rows, inputs), outputs = left.shape, right.shape[0]
    # Into the same memory each time: fresh pages cost up to half of the rate.
    result = torch.empty(rows, outputs, device=left.device, dtype=left.dtype)
    transposed = right.t()
    return Probe(
        f"{rows}x{inputs}x{outputs} {left.dtype}",
        2.0 * rows * inputs * outputs,
        lambda: torch.mm(left, transposed, out=result),
    )


def _best(probes: Iterable[Probe], device: torch.device) -> dict[str, float]:
    """Each probe's best rate in work a second."""
    rates = {}
    for probe in probes:
        best_s, spent_s, repeats = float("inf"), 0.0, 0
        while repeats <= MIN_REPEATS or spent_s < PROBE_S:
            took_s = _took_s(probe, device)
            best_s, spent_s, repeats = min(best_s, took_s), spent_s + took_s, repeats + 1
        rates[probe.name] = probe.work / best_s
    return rates


def _took_s(probe: Probe, device: torch.device) -> float:
    """Seconds of one run; on a GPU by its own clock, which leaves the host's calls out."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        probe.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0
    start_s = time.perf_counter()
    probe.run()
    return time.perf_counter() - start_s


def main(argv: list[str] | None = None) -> None:
    """Print the rates as JSON."""
    parser = argparse.ArgumentParser(prog="bench.machine", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="directory of a model, for the shapes of its matrices")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    shapes = linear_shapes(args.model) if args.model else []
    measured = measure_machine(torch.device(args.device), torch.bfloat16, shapes)
    print(json.dumps(measured.report(), indent=2))


if __name__ == "__main__":
    main()
