"""Makes the predictor that the settings name, from the files it was fitted into."""

import msgspec

from services.predictor.config import PredictorSettings
from services.predictor.predictors import (
    ConstantPredictor,
    InputLengthModel,
    InputLengthPredictor,
    LengthPredictor,
)
from shared.errors import ConfigError


def load_predictor(settings: PredictorSettings) -> LengthPredictor:
    """The predictor of ``settings.kind``; raises ``ConfigError`` if its file is none."""
    if settings.kind == "constant":
        return ConstantPredictor()
    path = settings.input_length_file
    try:
        model = msgspec.json.decode(path.read_bytes(), type=InputLengthModel)
    except (OSError, msgspec.MsgspecError) as error:
        variable = settings.env_name("input_length_file")
        raise ConfigError(f"{variable}={str(path)!r}: {error}") from error
    return InputLengthPredictor(model)
