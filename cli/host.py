"""What ``banyan up`` needs to know of the machine, without importing torch."""

import errno
import importlib
import importlib.util
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from cli.errors import CommandFailed
from cli.plan import Hardware
from cli.state import running_suites

_LAST_PORT = 65535
_PORTS_TRIED = 20
_NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_AGAIN)
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CUDA_OF_TORCH = re.compile(r"^cuda\b[^=]*= *'(.+)'", re.MULTILINE)


def find_hardware(device: str) -> Hardware:
    """The machine as far as workers on ``device`` (``auto``, ``cpu`` or ``cuda``) are concerned."""
    cuda_devices = () if device == "cpu" else _cuda_devices()
    return Hardware(num_cores=_num_cores(), cuda_devices=cuda_devices)


def check_ports(host: str, ports: Sequence[int]) -> None:
    """Raise ``CommandFailed`` unless a gateway can listen on each of ``ports``."""
    for port in ports:
        for suite in running_suites():  # one that still starts does not listen yet
            if any(url.endswith(f":{port}") for url in suite.urls):
                raise CommandFailed(
                    f"port {port} is in use by another `banyan up` (pid {suite.pid}): stop it with "
                    f"Ctrl-C, or choose another port{_for_instance(host, ports)}"
                )
        try:
            _try(host, port)
        except (OSError, OverflowError) as error:
            raise CommandFailed(_why_not(host, port, ports, error)) from error


def _try(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)


def _why_not(host: str, port: int, ports: Sequence[int], error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    what = f"cannot listen on {host}:{port} ({reason})"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EADDRNOTAVAIL, *_NO_SUCH_NAME):
        return f"{what}: choose an address of this machine with --host"
    return f"{what}: choose another port{_for_instance(host, ports)}"


def _for_instance(host: str, ports: Sequence[int]) -> str:
    """An option that would work, if one is found soon."""
    for first in range(ports[0] + 1, min(ports[0] + 1 + _PORTS_TRIED, _LAST_PORT - len(ports))):
        try:
            for port in range(first, first + len(ports)):
                _try(host, port)
        except OSError:
            continue
        return f", for instance with --port {first}"
    return " with --port"


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
