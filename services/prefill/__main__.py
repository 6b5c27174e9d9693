"""``python -m services.prefill``."""

import gc

if __name__ == "__main__":
    # Collections while torch and transformers are imported find nothing and take a second of CPU;
    # the worker turns them on again when it is ready.
    gc.disable()
    from services.prefill.config import PrefillSettings
    from services.prefill.service import PrefillService
    from shared.runtime import main

    main(PrefillService, PrefillSettings)
