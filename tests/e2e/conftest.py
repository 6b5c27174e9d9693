"""Suites of real processes, shared by the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.equality import BUNDLED, expected_answers
from bench.reference import Expected
from bench.suite import Suite, running_suite

MAX_TOKENS = 32


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The bundled model."""
    return BUNDLED


@pytest.fixture(scope="session")
def expected(model_dir: Path) -> list[Expected]:
    """What transformers answers to our own twenty prompts."""
    return expected_answers(model_dir, None, 20, MAX_TOKENS)


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    """1 prefill, 2 decode, fp32, UCX: what most tests talk to."""
    with running_suite("--dtype", "fp32", "--decode", "2", "--transport", "ucx") as running:
        yield running
