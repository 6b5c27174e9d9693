"""``python -m services.prefill``."""

from services.prefill.config import PrefillSettings
from services.prefill.service import PrefillService
from shared.runtime import main

if __name__ == "__main__":
    main(PrefillService, PrefillSettings)
