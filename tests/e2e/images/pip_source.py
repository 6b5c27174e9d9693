"""Lets a build in a container install from where pip on this host does.

Usage: ``pip_source.py FOLDER``. Writes ``FOLDER/pip.conf`` and ``FOLDER/ca-certificates.crt``.
Folders of this host that pip looks into are served on a port of the loopback device, for builds
that have the host's network; then this runs until it is killed. Standard library only.
"""

import configparser
import functools
import http.server
import os
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

CONFIG_FILES = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
LISTS = ("extra-index-url", "find-links", "trusted-host")
SCALARS = ("index-url", "timeout", "retries")
CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
DEBIAN_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def host_settings() -> dict[str, list[str]]:
    """What pip is told on this host, files first, then variables; values by option."""
    parser = configparser.RawConfigParser()
    parser.read([os.path.expanduser(name) for name in CONFIG_FILES])
    settings: dict[str, list[str]] = {}
    for option in (*LISTS, *SCALARS):
        values = parser.get("global", option, fallback="").split()
        given = os.environ.get(f"PIP_{option.upper().replace('-', '_')}", "").split()
        if option in LISTS:
            settings[option] = list(dict.fromkeys([*values, *given]))
        else:
            settings[option] = (given or values)[:1]
    return settings


def local_path(source: str) -> Path | None:
    """The folder that ``source`` names on this host, ``None`` for an address elsewhere."""
    if source.startswith("file:"):
        return Path(unquote(urlsplit(source).path))
    return Path(source) if source.startswith("/") else None


def write_config(folder: Path, settings: dict[str, list[str]], port: int, served: Path) -> bool:
    """Write the files of ``folder``, and links to local sources into ``served``; were there any?

    An index refers to files beside it, so the folder above it is served.
    """
    lines = ["[global]", f"cert = {DEBIAN_CERTIFICATES}"]
    has_local = False
    for option, sources in settings.items():
        values: list[str] = []
        for source in sources:
            path = local_path(source) if option not in ("timeout", "retries") else None
            if path is not None:
                has_local = True
                shared = path if option == "find-links" else path.parent
                link = served / f"{option}-{len(values)}"
                link.symlink_to(shared)
                inner = "" if shared == path else f"{path.name}/"
                source = f"http://127.0.0.1:{port}/{link.name}/{inner}"
            values.append(source)
        if values:
            lines.append(f"{option} = {' '.join(values)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    given = [os.environ[name] for name in CERTIFICATES if os.environ.get(name)]
    bundle = next((Path(name) for name in given if Path(name).is_file()), DEBIAN_CERTIFICATES)
    shutil.copyfile(bundle, folder / "ca-certificates.crt")
    return has_local


def main() -> None:
    """Write, then serve if there is anything to serve."""
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as served:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
        port = int(os.environ.get("BANYAN_E2E_PIP_PORT") or 0)
        with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
            if write_config(folder, host_settings(), server.server_address[1], Path(served)):
                server.serve_forever()


if __name__ == "__main__":
    main()
