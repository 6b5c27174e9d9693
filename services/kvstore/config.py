"""Settings of the KV store (``BANYAN_KVSTORE_…``)."""

from typing import ClassVar, Literal

from pydantic import Field

from shared.config import ServiceSettings


class KVStoreSettings(ServiceSettings):
    """What the KV store can be told."""

    service: ClassVar[str] = "kvstore"

    capacity_bytes: int = Field(default=1 << 30, gt=0)
    """Host memory for blocks, those that are arriving included.

    What the transport keeps to land payloads in comes on top.
    """
    transport: Literal["auto", "ucx", "tcp"] = "auto"
    transport_host: str = "127.0.0.1"

    lookup_pin_s: float = Field(default=2.0, gt=0)
    """How long a lookup keeps what it found, so that the get which follows finds it."""
    max_gets: int = Field(default=256, gt=0)
    """Gets under way; more are refused."""
    max_sending: int = Field(default=8, gt=0)
    """Gets that send at a time: each has two layers of its blocks in memory, the others wait."""
    max_get_s: float = Field(default=30.0, gt=0)
    """Longest deadline of a get, whatever it asks for."""

    max_puts: int = Field(default=64, gt=0)
    """Puts under way; of more offers nothing is wanted."""
    put_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of a whole put; what is incomplete by then is dropped."""
    put_idle_s: float = Field(default=5.0, gt=0)
    """A put whose next piece does not come for this long is over."""
