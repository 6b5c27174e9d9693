"""``python -m services.kvstore``."""

from services.kvstore.config import KVStoreSettings
from services.kvstore.service import KVStoreService
from shared.runtime import main

if __name__ == "__main__":
    main(KVStoreService, KVStoreSettings)
