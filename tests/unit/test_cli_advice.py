"""What is read in the log of a service that starts."""

import io
import logging

import pytest

from cli.advice import LoggedError, Progress, advice_for, error_in, progress_in
from shared.errors import BanyanError, ConfigError, OutOfMemory, UnsupportedModel
from shared.logging import JsonFormatter, TextFormatter

FORMATTERS = [TextFormatter("decode", "decode-0-ab"), JsonFormatter("decode", "decode-0-ab")]


@pytest.fixture(params=FORMATTERS, ids=lambda formatter: type(formatter).__name__)
def stream(request: pytest.FixtureRequest) -> io.StringIO:
    """What a logger called ``test`` wrote, in one of the formats there are."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param)
    logger = logging.getLogger("test.advice")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return stream


log = logging.getLogger("test.advice")


def test_how_far_loading_is_stands_in_the_log(stream: io.StringIO) -> None:
    log.info("%s", "loading weights", extra={"fraction": 0.05})
    log.info("%s", "ready", extra={"fraction": 1.0})
    log.info("ready", extra={"start_s": 1.5})
    log.info("half of it, fraction 0.5")
    assert [progress_in(line) for line in stream.getvalue().splitlines()] == [
        Progress(what="loading weights", fraction=0.05),
        Progress(what="ready", fraction=1.0),
        None,
        None,
    ]


@pytest.mark.parametrize("line", ["", "{", "[1]", "Traceback (most recent call last):", '{"a": 1}'])
def test_other_lines_say_nothing(line: str) -> None:
    assert progress_in(line) is None
    assert error_in(line) is None


@pytest.mark.parametrize(
    ("error", "is_hopeless"),
    [
        (UnsupportedModel("an encoder: its attention is not causal"), True),
        (ConfigError("device='cuda': torch sees no GPU"), True),
        (OutOfMemory("the weights are 9 bytes; cpu has 8"), False),
    ],
)
def test_the_error_that_ended_a_start_is_found(
    stream: io.StringIO, error: BanyanError, is_hopeless: bool
) -> None:
    log.info("effective settings", extra={"settings": {"model": "ConfigError: no"}})
    try:
        try:
            raise ValueError("inner: cause")
        except ValueError as cause:
            raise error from cause
    except BanyanError:
        log.critical("start failed", exc_info=True)
    log.info("stopped", extra={"exit_code": 1})
    found = error_in(stream.getvalue())
    assert found == LoggedError(kind=type(error).__name__, text=str(error))
    assert found.is_hopeless == is_hopeless


def test_errors_of_others_are_not_explained(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("who knows")
    except RuntimeError:
        log.critical("start failed", exc_info=True)
    assert error_in(stream.getvalue()) is None


def test_too_little_memory_comes_with_advice() -> None:
    cuda = error_in("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert cuda is not None and cuda.kind == "OutOfMemory"
    assert "--memory-fraction" in (advice_for(cuda, 1) or "")
    assert "want of memory" in (advice_for(None, -9) or "")
    assert advice_for(None, 1) is None
    assert advice_for(LoggedError(kind="ConfigError", text="x"), 1) is None
