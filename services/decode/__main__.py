"""``python -m services.decode``."""

from services.decode.config import DecodeSettings
from services.decode.service import DecodeService
from shared.runtime import main

if __name__ == "__main__":
    main(DecodeService, DecodeSettings)
