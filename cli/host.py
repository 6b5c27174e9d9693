"""What ``banyan up`` needs to know of the machine, without importing torch."""

import importlib
import importlib.util
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from cli.errors import CommandFailed
from cli.plan import Hardware
from cli.state import running_suites

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CUDA_OF_TORCH = re.compile(r"^cuda\b[^=]*= *'(.+)'", re.MULTILINE)


def find_hardware(device: str) -> Hardware:
    """The machine as far as workers on ``device`` (``auto``, ``cpu`` or ``cuda``) are concerned."""
    cuda_devices = () if device == "cpu" else _cuda_devices()
    return Hardware(num_cores=_num_cores(), cuda_devices=cuda_devices)


def check_ports(host: str, ports: Iterable[int]) -> None:
    """Raise ``CommandFailed`` unless a gateway can listen on each of ``ports``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except (OSError, OverflowError) as error:
                raise CommandFailed(_why_not(host, port, error)) from error


def _why_not(host: str, port: int, error: Exception) -> str:
    for suite in running_suites():
        if any(url.endswith(f":{port}") for url in suite.urls):
            return (
                f"port {port} is in use by another `banyan up` (pid {suite.pid}): "
                "stop it with Ctrl-C, or choose another port with --port"
            )
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"cannot listen on {host}:{port} ({reason}): choose another port with --port"


def _num_cores() -> int:
    """CPU cores this process may use: its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    if _CPU_QUOTA.is_file():
        quota, _, period = _CPU_QUOTA.read_text().partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            num_cores = min(num_cores, max(1, int(quota) // int(period)))
    return num_cores


def _cuda_devices() -> tuple[str, ...]:
    """The CUDA devices torch could use, named as ``CUDA_VISIBLE_DEVICES`` names them."""
    if not _torch_has_cuda():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return tuple(name for name in names if name and name != "-1")
    return tuple(str(index) for index in range(_num_nvidia_devices()))


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA; importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).with_name("version.py")
    return version_file.is_file() and bool(_CUDA_OF_TORCH.search(version_file.read_text()))


def _num_nvidia_devices() -> int:
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
