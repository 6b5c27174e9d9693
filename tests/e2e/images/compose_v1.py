"""Writes the compose files again for Docker Compose 1, which does not know ``!reset``.

Usage: ``compose_v1.py FOLDER FILE OVERRIDE``. What ``OVERRIDE`` resets is taken out of both; all
else stays. Debian 12 still has that version. Needs PyYAML, which it comes with.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


class Reset:
    """Stands where ``!reset`` was."""


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Knows the tag."""


Loader.add_constructor("!reset", lambda loader, node: Reset())


def without_resets(file: dict[str, Any], override: dict[str, Any]) -> None:
    """Take what ``override`` resets out of both."""
    for key, value in list(override.items()):
        if isinstance(value, Reset):
            del override[key]
            file.pop(key, None)
        elif isinstance(value, dict):
            inner = file.get(key)
            without_resets(inner if isinstance(inner, dict) else {}, value)


def main() -> None:
    """Read two files, write two files."""
    folder = Path(sys.argv[1])
    # Through JSON anchors become copies, so that nothing is changed for two services at once.
    marks = [yaml.load(Path(name).read_text(), Loader=Loader) for name in sys.argv[2:4]]
    file, override = (plain(mark) for mark in marks)
    without_resets(file, override)
    for name, content in zip(sys.argv[2:4], (file, override), strict=True):
        (folder / Path(name).name).write_text(json.dumps(content, indent=2) + "\n")


def plain(value: Any) -> Any:
    """A copy without extension fields, in which nothing is shared."""
    if isinstance(value, dict):
        # Extension fields have done their work: Compose 1 would interpolate them for nothing.
        return {k: plain(v) for k, v in value.items() if not str(k).startswith("x-")}
    return [plain(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
