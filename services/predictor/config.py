"""Settings of the predictor (``BANYAN_PREDICTOR_…``)."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from shared.config import ServiceSettings

INPUT_LENGTH_FILE = Path(__file__).with_name("input_length.json")


class PredictorSettings(ServiceSettings):
    """What the predictor can be told."""

    service: ClassVar[str] = "predictor"

    kind: Literal["constant", "input_length"] = "input_length"
    """Which predictor answers."""
    input_length_file: Path = INPUT_LENGTH_FILE
    """Coefficients of ``input_length``, written by ``services/predictor/fit_input_length.py``."""

    max_batch_size: int = Field(default=32, gt=0)
    """Questions predicted at a time."""
    max_batch_wait_s: float = Field(default=0.0, ge=0)
    """How long a batch that is not full is kept open; 0 takes what waits at that moment.

    The next batch gathers while one is predicted, so a wait pays only with slow models.
    """
    max_waiting: int = Field(default=1024, gt=0)
    """More waiting questions than this are refused."""
    answer_timeout_s: float = Field(default=1.0, gt=0)
    """A question without an answer by then is given up: its asker goes on without."""
