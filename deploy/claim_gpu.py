"""Runs a command on a GPU that it shares with no more than it is meant to.

Usage: ``claim_gpu.py COMMAND...``; the command replaces this process. Replicas of one container
have the same settings, so they cannot be told apart by them; here each takes a GPU for itself.

=========================  ====================================================================
``BANYAN_GPUS``            ``all``, or what ``CUDA_VISIBLE_DEVICES`` would have, of which one is
                           taken; empty: no GPU is taken, the command just runs
``BANYAN_WORKERS_PER_GPU`` how many may share one (1)
``BANYAN_GPU_LOCKS``       a folder that all of them see (``/run/banyan/gpus``)
=========================  ====================================================================

A claim is a lock on a file, held by the open file that the command inherits: it ends with the
command, however that ends. The command finds its GPU in ``CUDA_VISIBLE_DEVICES``, and unless that
is set, its share of the memory in ``BANYAN_PREFILL_MEMORY_FRACTION`` and
``BANYAN_DECODE_MEMORY_FRACTION``. Exit code 1 if all GPUs are taken, 2 for wrong settings.
"""

import fcntl
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

GPU_MEMORY_FRACTION = 0.9
"""For all workers on a GPU together."""


def claim(gpus: Sequence[str], workers_per_gpu: int, locks: Path) -> str | None:
    """The GPU that is this process's from now on, one with the fewest others on it.

    ``None`` if all are taken. Raises ``OSError`` if ``locks`` cannot be written.
    """
    for slot in range(workers_per_gpu):
        for gpu in gpus:
            path = locks / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.{slot}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            os.set_inheritable(descriptor, True)  # the lock lives as long as the command
            return gpu
    return None


def list_gpus(names: str) -> list[str]:
    """The GPUs that ``BANYAN_GPUS`` means, ``all`` by their UUIDs, the same in every container.

    Raises ``RuntimeError`` if ``all`` are asked for and there is no driver to ask.
    """
    if names.strip() != "all":
        return [name.strip() for name in names.split(",") if name.strip()]
    pynvml = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise RuntimeError(f"the NVIDIA driver is not in this container ({error})") from error
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def main() -> int:
    """Returns the exit code, if there is no GPU to run the command on."""
    command = sys.argv[1:]
    if not command:
        print("claim_gpu.py: no command to run", file=sys.stderr)
        return 2
    names = os.environ.get("BANYAN_GPUS", "")
    if names.strip():
        workers_per_gpu = os.environ.get("BANYAN_WORKERS_PER_GPU") or "1"
        if not workers_per_gpu.isdigit() or int(workers_per_gpu) < 1:
            print(f"BANYAN_WORKERS_PER_GPU={workers_per_gpu}: not 1 or more", file=sys.stderr)
            return 2
        locks = Path(os.environ.get("BANYAN_GPU_LOCKS") or "/run/banyan/gpus")
        try:
            gpus = list_gpus(names)
            gpu = claim(gpus, int(workers_per_gpu), locks)
        except (RuntimeError, ImportError, OSError) as error:
            print(f"BANYAN_GPUS={names}: {error}", file=sys.stderr)
            return 2
        if gpu is None:
            print(
                f"all {len(gpus)} GPUs have {workers_per_gpu} workers: run fewer, name more in "
                "BANYAN_GPUS, or let more share one with BANYAN_WORKERS_PER_GPU",
                file=sys.stderr,
            )
            return 1
        print(f"running on GPU {gpu}", file=sys.stderr)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        share = f"{GPU_MEMORY_FRACTION / int(workers_per_gpu):.4f}"
        for role in ("PREFILL", "DECODE"):
            variable = f"BANYAN_{role}_MEMORY_FRACTION"
            os.environ[variable] = os.environ.get(variable) or share
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
