"""``python -m services.placer``."""

from services.placer.config import PlacerSettings
from services.placer.service import PlacerService
from shared.runtime import main

if __name__ == "__main__":
    main(PlacerService, PlacerSettings)
