"""Loading a model says how far it is, weight by weight."""

from transformers.utils import logging

from shared.config import BUNDLED_MODEL
from shared.engine.model import load_model


def test_loading_tells_how_many_of_the_weights_are_there() -> None:
    said: list[tuple[str, float]] = []
    before = logging.set_tqdm_hook(None)
    logging.set_tqdm_hook(before)
    load_model(
        BUNDLED_MODEL,
        dtype="fp32",
        device="cpu",
        on_progress=lambda what, fraction: said.append((what, fraction)),
    )
    fractions = [fraction for _, fraction in said]
    assert fractions == sorted(fractions)
    assert len([what for what, _ in said if what == "loading weights"]) >= 8
    assert said[-1][1] == 0.8
    assert logging.set_tqdm_hook(before) is before  # nothing stays behind
