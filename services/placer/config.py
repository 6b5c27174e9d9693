"""Settings of the placer (``BANYAN_PLACER_…``)."""

from typing import ClassVar

from pydantic import Field

from shared.config import ServiceSettings


class PlacerSettings(ServiceSettings):
    """What the placer can be told."""

    service: ClassVar[str] = "placer"

    instance_ttl_s: float = Field(default=2.0, gt=0)
    """A worker silent for this long is gone."""
