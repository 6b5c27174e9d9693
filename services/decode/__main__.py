"""``python -m services.decode``."""

import gc

if __name__ == "__main__":
    # Collections while torch and transformers are imported find nothing and take a second of CPU;
    # the worker turns them on again when it is ready.
    gc.disable()
    from services.decode.config import DecodeSettings
    from services.decode.service import DecodeService
    from shared.runtime import main

    main(DecodeService, DecodeSettings)
