"""Between workers and the global KV store. Keys name full blocks; the bytes travel by transfer."""

from shared.messages.base import Message


class LookupPrefix(Message, frozen=True, kw_only=True):
    """How many of these blocks, from the first on, are in the store?

    Publisher: a worker. Subscriber: one store, on ``kv.<instance>.lookup``. Delivery:
    request/reply. Idempotent. ``keys`` are the chained block keys of a prompt, in order.
    """

    kv_layout: str
    keys: tuple[bytes, ...]


class PrefixFound(Message, frozen=True, kw_only=True):
    """The longest run of blocks present.

    Publisher: the store. Subscriber: the asking worker. Delivery: reply. The blocks stay pinned
    for a short while, so that a get which follows finds them.
    """

    num_blocks: int


class GetBlocks(Message, frozen=True, kw_only=True):
    """Send these blocks, layer by layer, to ``address``.

    Publisher: a worker. Subscriber: one store, on ``kv.<instance>.get``. Delivery: request/reply
    with ``Done`` whose ``count`` is the number of blocks that will come (fewer than asked is a
    miss for the rest). Idempotency key: ``transfer_id``.
    """

    kv_layout: str
    keys: tuple[bytes, ...]
    transfer_id: int
    address: bytes
    timeout_s: float


class PutBlocks(Message, frozen=True, kw_only=True):
    """These blocks are on offer.

    Publisher: a worker. Subscriber: one store, on ``kv.<instance>.put``. Delivery: request/reply
    with ``PutAccepted``. Idempotent: blocks are content-addressed and immutable.
    """

    kv_layout: str
    keys: tuple[bytes, ...]
    num_layers: int
    layer_bytes: tuple[int, ...]


class PutAccepted(Message, frozen=True, kw_only=True):
    """Which of the offered blocks the store wants, and where to send them, layer by layer.

    Publisher: the store. Subscriber: the offering worker. Delivery: reply. ``wanted`` are indices
    into the offered keys; empty means that there is nothing to send.
    """

    wanted: tuple[int, ...]
    transfer_id: int = 0
    address: bytes = b""
