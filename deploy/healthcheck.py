"""Asks the service in this container how it is; the container's health check.

Usage: ``healthcheck.py [PATH]``. Exit code 0 if ``PATH`` (``/health/ready`` by default) answers
200, else 1, with the answer or the error on standard output. ``/metrics`` prints the metrics.

The port is the one in the file that ``BANYAN_HEALTH_PORT_FILE`` names. Standard library only and
few modules of it: this runs every few seconds.
"""

import os
import socket
import sys

TIMEOUT_S = 2.0


def fetch(port: int, path: str) -> tuple[int, str]:
    """Status and body of ``GET path`` from the service on this host.

    Raises ``OSError`` if nothing answers in time, ``ValueError`` for what is no HTTP.
    """
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65536):  # the server closes when it has answered
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/"):
        raise ValueError(f"no HTTP: {answer[:100]!r}")
    return int(words[1]), body.decode()


def main() -> int:
    """Returns the exit code."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/health/ready"
    try:
        with open(os.environ.get("BANYAN_HEALTH_PORT_FILE", "/tmp/health.port")) as file:
            port = int(file.read())
        status, body = fetch(port, path)
    except (OSError, ValueError) as error:
        print(f"not healthy: {error}")
        return 1
    print(body, end="")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
