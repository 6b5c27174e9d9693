"""``python -m services.predictor``."""

from services.predictor.config import PredictorSettings
from services.predictor.service import PredictorService
from shared.runtime import main

if __name__ == "__main__":
    main(PredictorService, PredictorSettings)
