"""``python -m services.gateway``."""

from services.gateway.config import GatewaySettings
from services.gateway.service import GatewayService
from shared.runtime import main

if __name__ == "__main__":
    main(GatewayService, GatewaySettings)
