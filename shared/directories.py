"""Where Banyan keeps a user's files."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """For what can be done without: ``$XDG_CACHE_HOME/banyan``."""
    return _base("XDG_CACHE_HOME", ".cache") / "banyan"


def data_dir() -> Path:
    """For what would be missed: ``$XDG_DATA_HOME/banyan``."""
    return _base("XDG_DATA_HOME", ".local/share") / "banyan"


def _base(variable: str, default: str) -> Path:
    base = os.environ.get(variable)
    return Path(base) if base else Path.home() / default
