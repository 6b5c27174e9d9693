"""What holds for every test: a clean environment, one torch thread, no GPU unless there is one."""

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

DATA_DIR = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Settings of the shell are none of the tests'; threads are not to fight for the cores."""
    for name in list(os.environ):
        if name.upper().startswith("BANYAN_"):
            del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The user's database is not for tests: what opens one without naming it opens this.
    config.stash[DATA_DIR] = os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="banyan-tests-")
    # Speed is not what a property test is about, and a busy machine would fail it.
    hypothesis.settings.register_profile("banyan", deadline=None)
    hypothesis.settings.load_profile("banyan")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    shutil.rmtree(config.stash[DATA_DIR], ignore_errors=True)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What a test configures of logging is gone with it."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    levels = {name: known.level for name, known in _loggers().items()}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.disable(disabled)
    for name, known in _loggers().items():
        known.setLevel(levels.get(name, logging.NOTSET))


def _loggers() -> dict[str, logging.Logger]:
    known = logging.Logger.manager.loggerDict
    return {name: item for name, item in known.items() if isinstance(item, logging.Logger)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, and say so, where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu") is not None]
    if needing and not _has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, there is none"))


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
