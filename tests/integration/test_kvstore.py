"""The KV store as its workers see it, over the memory twins and over NATS with TCP."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.kvstore.config import KVStoreSettings
from services.kvstore.service import KVStoreService
from shared.bus.base import Bus
from shared.errors import NoResponder, RemoteError, TransferTimeout
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.kv import GetBlocks, LookupPrefix, PrefixFound, PutAccepted, PutBlocks
from shared.messages.load import Drain, InstanceExited, InstanceState, ServiceReport
from shared.messages.requests import Done
from shared.runtime import Runtime
from shared.transport.base import Piece, PieceHeader, PieceKind, TransferIds, Transport
from tests.integration.bus_rig import until
from tests.integration.service_rig import MemoryWorld, World, open_world

LAYOUT = "model/bf16-b64-2x2x64"
LAYER_BYTES = (24_576, 30_000)
"""One layer of whole checksum rows and one that is not; both larger than what travels inline."""
BLOCK_BYTES = sum(LAYER_BYTES)
TIMEOUT_S = 10.0


@pytest.fixture(params=["memory", "real"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as world:
        yield world


@pytest.fixture
async def memory() -> AsyncIterator[MemoryWorld]:
    """For what is the same in every world."""
    world = MemoryWorld()
    yield world
    await world.close()


def keys_of(*names: str) -> tuple[bytes, ...]:
    return tuple(name.encode() for name in names)


def data_of(key: bytes, layer: int) -> bytes:
    """What the KV of this block and layer is in these tests."""
    return (key + bytes([layer])) * LAYER_BYTES[layer]


def piece_of(key: bytes, layer: int) -> bytes:
    return data_of(key, layer)[: LAYER_BYTES[layer]]


@dataclass
class Client:
    """A worker, as far as the store can tell."""

    bus: Bus
    transport: Transport
    store: str
    ids: TransferIds

    async def lookup(self, keys: Sequence[bytes], layout: str = LAYOUT) -> int:
        question = LookupPrefix(kv_layout=layout, keys=tuple(keys))
        answer = await self.bus.request(
            subjects.kv(self.store, "lookup"), question, PrefixFound, timeout_s=TIMEOUT_S
        )
        return answer.num_blocks

    async def offer(self, keys: Sequence[bytes], **changes: Any) -> PutAccepted:
        fields: dict[str, Any] = {
            "kv_layout": LAYOUT,
            "keys": tuple(keys),
            "num_layers": len(LAYER_BYTES),
            "layer_bytes": LAYER_BYTES,
        }
        return await self.bus.request(
            subjects.kv(self.store, "put"),
            PutBlocks(**(fields | changes)),
            PutAccepted,
            timeout_s=TIMEOUT_S,
        )

    async def send(
        self,
        accepted: PutAccepted,
        number: int,
        key: bytes,
        block: int,
        layer: int,
        *,
        payload: bytes | None = None,
        checksum: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        header = PieceHeader(
            transfer_id=accepted.transfer_id,
            piece=number,
            kind=PieceKind.KV,
            layer=layer,
            block_lo=block,
            block_hi=block + 1,
            head_lo=0,
            head_hi=2 + layer,
        )
        data = piece_of(key, layer) if payload is None else payload
        await self.transport.send(
            accepted.address, header, data, timeout_s=timeout_s, checksum=checksum
        )

    async def put(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """Offer, and send layer by layer what is wanted."""
        accepted = await self.offer(keys)
        number = 0
        for layer in range(len(LAYER_BYTES)):
            for block in accepted.wanted:
                await self.send(accepted, number, keys[block], block, layer)
                number += 1
        return accepted.wanted

    async def ask(
        self, keys: Sequence[bytes], *, layout: str = LAYOUT, timeout_s: float = TIMEOUT_S
    ) -> tuple[int, int]:
        """Ask for blocks; the transfer they will come by, and how many."""
        transfer_id = self.ids.next()
        get = GetBlocks(
            kv_layout=layout,
            keys=tuple(keys),
            transfer_id=transfer_id,
            address=self.transport.address,
            timeout_s=timeout_s,
        )
        done = await self.bus.request(
            subjects.kv(self.store, "get"), get, Done, timeout_s=TIMEOUT_S
        )
        return transfer_id, done.count

    async def receive(self, transfer_id: int) -> list[Piece]:
        """All pieces of a transfer up to the first that is no KV."""
        pieces: list[Piece] = []
        while not pieces or pieces[-1].header.kind is PieceKind.KV:
            piece = await self.transport.receive(transfer_id, len(pieces), timeout_s=TIMEOUT_S)
            pieces.append(piece)
        return pieces


class Store:
    """A running store with one client."""

    def __init__(self, world: World, *, verify: bool = True, **settings: Any) -> None:
        self._world = world
        self.settings = KVStoreSettings.load(**(world.settings() | settings))
        self._service = KVStoreService(
            self.settings,
            open_bus=world.open_bus,
            make_transport=lambda _: world.new_transport(verify=verify),
        )
        self._verify = verify
        self._running: AbstractAsyncContextManager[Runtime] = world.running(
            self._service, self.settings
        )

    async def __aenter__(self) -> "Store":
        self.runtime = await self._running.__aenter__()
        self.client = await self.new_client()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._running.__aexit__(*error)

    async def new_client(self) -> Client:
        return Client(
            await self._world.bus(),
            await self._world.transport(),
            self.settings.instance,
            TransferIds(),
        )

    def count(self, what: str) -> float:
        value = self.runtime.metrics.value(f"banyan_kvstore_{what}")
        assert value is not None, what
        return value

    async def stored(self, num_blocks: int) -> None:
        """Wait until that many blocks have become visible since the start."""
        await until(lambda: self.count("stored_blocks_total") >= num_blocks)

    async def report(self) -> ServiceReport:
        """The next report that the store makes of itself."""
        reports: asyncio.Queue[Message] = asyncio.Queue()
        bus = self.client.bus

        async def take(message: Message, subject: str) -> None:
            reports.put_nowait(message)

        subscription = await bus.subscribe(subjects.load("kvstore", self.settings.instance), take)
        async with asyncio.timeout(TIMEOUT_S):
            message = await reports.get()
        await subscription.unsubscribe()
        assert isinstance(message, ServiceReport)
        return message


async def test_what_was_put_can_be_found_and_fetched(world: World) -> None:
    async with Store(world) as store:
        client, keys = store.client, keys_of("a", "b", "c")
        assert await client.lookup(keys) == 0
        assert await client.put(keys) == (0, 1, 2)
        await store.stored(3)
        assert await client.lookup([*keys, b"d"]) == 3

        transfer_id, count = await client.ask([*keys, b"d"])
        assert count == 3
        *layers, trailer = await client.receive(transfer_id)
        assert [bytes(piece.payload) for piece in layers] == [
            b"".join(piece_of(key, layer) for key in keys) for layer in (0, 1)
        ]
        assert [
            (h.layer, h.block_lo, h.block_hi, h.head_lo, h.head_hi)
            for h in (piece.header for piece in layers)
        ] == [(0, 0, 3, 0, 2), (1, 0, 3, 0, 3)]
        assert trailer.header.kind is PieceKind.TRAILER
        assert trailer.header.piece == 2
        assert (store.count("hit_blocks_total"), store.count("missed_blocks_total")) == (3, 4)
        await until(lambda: store.count("sent_bytes_total") == 3 * BLOCK_BYTES)


async def test_another_worker_finds_it_too(world: World) -> None:
    async with Store(world) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        other = await store.new_client()
        transfer_id, count = await other.ask(keys_of("a"))
        assert count == 1
        assert len(await other.receive(transfer_id)) == 3


async def test_a_prefix_is_fetched_and_the_rest_is_a_miss(world: World) -> None:
    async with Store(world) as store:
        await store.client.put(keys_of("a", "b"))
        await store.stored(2)
        transfer_id, count = await store.client.ask(keys_of("a", "x", "b"))
        assert count == 1
        assert len((await store.client.receive(transfer_id))[0].payload) == LAYER_BYTES[0]
        transfer_id, count = await store.client.ask(keys_of("x", "a"))
        assert count == 0
        (trailer,) = await store.client.receive(transfer_id)
        assert trailer.header.kind is PieceKind.TRAILER


async def test_layouts_do_not_mix(memory: MemoryWorld) -> None:
    async with Store(memory) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        assert await store.client.lookup(keys_of("a"), layout="another") == 0
        _, count = await store.client.ask(keys_of("a"), layout="another")
        assert count == 0


async def test_a_block_that_is_here_or_on_its_way_is_not_wanted_again(memory: MemoryWorld) -> None:
    async with Store(memory) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        first = await store.client.offer(keys_of("a", "b"))
        assert first.wanted == (1,)
        second = await store.client.offer(keys_of("a", "b", "c"))
        assert second.wanted == (2,)
        assert await store.client.put(keys_of("a")) == ()


async def test_a_block_is_seen_only_when_all_its_layers_are_here(world: World) -> None:
    async with Store(world) as store:
        client, keys = store.client, keys_of("a", "b")
        accepted = await client.offer(keys)
        await client.send(accepted, 0, b"a", 0, 0)
        await client.send(accepted, 1, b"b", 1, 0)
        await until(lambda: store.count("received_bytes_total") == 2 * LAYER_BYTES[0])
        assert await client.lookup(keys) == 0
        await client.send(accepted, 2, b"a", 0, 1)
        await store.stored(1)
        assert await client.lookup(keys) == 1
        await client.send(accepted, 3, b"b", 1, 1)
        await store.stored(2)
        assert await client.lookup(keys) == 2
        assert store.count("incomplete_put_transfers_total") == 0


async def test_a_put_that_stalls_is_dropped_but_for_its_complete_blocks(world: World) -> None:
    async with Store(world, put_idle_s=0.2) as store:
        client, keys = store.client, keys_of("a", "b")
        accepted = await client.offer(keys)
        for number, layer in enumerate((0, 1)):
            await client.send(accepted, number, b"a", 0, layer)
        await client.send(accepted, 2, b"b", 1, 0)
        await until(lambda: store.count("incomplete_put_transfers_total") == 1)
        assert await client.lookup(keys) == 1
        # What comes late is thrown away without a wait, and the block can be offered anew.
        await client.send(accepted, 3, b"b", 1, 1)
        assert await client.lookup(keys) == 1
        assert await client.put(keys) == (1,)
        await store.stored(2)
        assert await client.lookup(keys) == 2


async def test_a_put_has_a_deadline_however_lively_it_is(memory: MemoryWorld) -> None:
    async with Store(memory, put_idle_s=60.0, put_timeout_s=0.1) as store:
        await store.client.offer(keys_of("a"))
        await until(lambda: store.count("incomplete_put_transfers_total") == 1)
        assert (await store.client.offer(keys_of("a"))).wanted == (0,)


async def test_a_sender_may_end_a_put_early(memory: MemoryWorld) -> None:
    async with Store(memory, put_idle_s=60.0) as store:
        accepted = await store.client.offer(keys_of("a"))
        end = PieceHeader(transfer_id=accepted.transfer_id, piece=0, kind=PieceKind.ABORT)
        await store.client.transport.send(accepted.address, end, timeout_s=TIMEOUT_S)
        await until(lambda: store.count("incomplete_put_transfers_total") == 1)


@pytest.mark.parametrize(
    ("block", "layer", "payload"),
    [
        (1, 0, None),  # not wanted
        (0, 7, b"x" * 8192),  # no such layer
        (0, 0, b"x" * 8191),  # not the size that was announced
    ],
)
async def test_a_piece_that_was_not_asked_for_ends_the_put(
    memory: MemoryWorld, block: int, layer: int, payload: bytes | None
) -> None:
    async with Store(memory, put_idle_s=60.0) as store:
        accepted = await store.client.offer(keys_of("a"))
        await store.client.send(accepted, 0, b"a", block, layer, payload=payload)
        await until(lambda: store.count("incomplete_put_transfers_total") == 1)
        assert await store.client.lookup(keys_of("a")) == 0


async def test_bytes_that_changed_on_the_way_are_not_stored(memory: MemoryWorld) -> None:
    async with Store(memory, put_idle_s=60.0) as store:
        accepted = await store.client.offer(keys_of("a"))
        await store.client.send(accepted, 0, b"a", 0, 0, checksum=12345)
        await until(lambda: store.count("incomplete_put_transfers_total") == 1)
        assert await store.client.lookup(keys_of("a")) == 0


async def test_bytes_that_changed_in_memory_are_never_delivered(memory: MemoryWorld) -> None:
    """The store's transport does not verify here, so a wrong checksum stands for damaged memory."""
    async with Store(memory, verify=False) as store:
        client = store.client
        client.transport = await memory.transport(verify=False)
        sender = await store.new_client()
        keys = keys_of("a", "b")
        accepted = await sender.offer(keys)
        for number, (block, layer) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            wrong = 12345 if (block, layer) == (1, 1) else None
            await sender.send(accepted, number, keys[block], block, layer, checksum=wrong)
        await store.stored(2)
        transfer_id, count = await client.ask(keys)
        assert count == 2
        first, abort = await client.receive(transfer_id)
        assert first.header.kind is PieceKind.KV
        assert abort.header.kind is PieceKind.ABORT
        assert b"block 1" in bytes(abort.payload)
        assert await client.lookup(keys) == 1, "only the damaged block is dropped"
        assert store.count("corrupt_blocks_total") == 1
        await until(lambda: store.count("failed_get_transfers_total") == 1)
        assert (await sender.offer(keys)).wanted == (1,)


async def test_the_least_recently_used_goes_and_what_was_looked_up_stays(world: World) -> None:
    async with Store(world, capacity_bytes=2 * BLOCK_BYTES + 1) as store:
        client = store.client
        await client.put(keys_of("a"))
        await store.stored(1)
        await client.put(keys_of("b"))
        await store.stored(2)
        assert await client.lookup(keys_of("a")) == 1
        await client.put(keys_of("c"))
        await store.stored(3)
        assert await client.lookup(keys_of("a")) == 1
        assert await client.lookup(keys_of("b")) == 0
        assert store.count("evicted_blocks_total") == 1
        # Both that are here were looked up just now: nothing makes room for another.
        assert await client.lookup(keys_of("c")) == 1
        assert await client.put(keys_of("d")) == ()


async def test_a_worker_that_does_not_take_its_blocks_costs_a_deadline(world: World) -> None:
    async with Store(world, max_gets=1) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        _, count = await store.client.ask(keys_of("a"), timeout_s=0.3)
        assert count == 1
        with pytest.raises(RemoteError, match="1 gets are under way") as refused:
            await store.client.ask(keys_of("a"))
        assert refused.value.code == "Refused"
        await until(lambda: store.count("failed_get_transfers_total") == 1)
        transfer_id, _ = await store.client.ask(keys_of("a"))
        assert len(await store.client.receive(transfer_id)) == 3


async def test_gets_wait_for_their_turn_and_all_arrive(world: World) -> None:
    async with Store(world, max_sending=1) as store:
        await store.client.put(keys_of("a", "b"))
        await store.stored(2)
        asked = [await store.client.ask(keys_of("a", "b")) for _ in range(5)]
        received = await asyncio.gather(*(store.client.receive(i) for i, _ in asked))
        assert [len(pieces) for pieces in received] == [3] * 5


async def test_a_worker_that_dies_ends_its_get_at_once(memory: MemoryWorld) -> None:
    async with Store(memory) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        dying = await store.new_client()
        await dying.ask(keys_of("a"), timeout_s=600.0)
        await memory.fabric.kill(dying.transport.address)
        await until(lambda: store.count("failed_get_transfers_total") == 1)


async def test_more_offers_than_can_be_received_are_not_taken(memory: MemoryWorld) -> None:
    async with Store(memory, max_puts=1) as store:
        assert (await store.client.offer(keys_of("a"))).wanted == (0,)
        assert (await store.client.offer(keys_of("b"))).wanted == ()
        assert store.count("skipped_put_requests_total") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"num_layers": 0, "layer_bytes": ()},
        {"layer_bytes": (8192, 0)},
        {"layer_bytes": (8192, (1 << 30) + 1)},
    ],
)
async def test_an_offer_that_makes_no_sense_is_refused(
    memory: MemoryWorld, changes: dict[str, Any]
) -> None:
    async with Store(memory) as store:
        with pytest.raises(RemoteError) as refused:
            await store.client.offer(keys_of("a"), **changes)
        assert refused.value.code == "InvalidRequest"


@pytest.mark.parametrize("changes", [{"transfer_id": 5}, {"timeout_s": 0.0}])
async def test_a_get_that_makes_no_sense_is_refused(
    memory: MemoryWorld, changes: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {"transfer_id": 1 << 20, "timeout_s": 1.0}
    async with Store(memory) as store:
        get = GetBlocks(kv_layout=LAYOUT, keys=(b"a",), address=b"", **(fields | changes))
        with pytest.raises(RemoteError) as refused:
            await store.client.bus.request(
                subjects.kv(store.settings.instance, "get"), get, Done, timeout_s=TIMEOUT_S
            )
        assert refused.value.code == "InvalidRequest"


async def test_the_report_says_how_full_it_is(world: World) -> None:
    async with Store(world, capacity_bytes=10 * BLOCK_BYTES) as store:
        await store.client.put(keys_of("a", "b"))
        await store.stored(2)
        await store.client.offer(keys_of("c"))
        report = await store.report()
        assert report.role == "kvstore"
        assert report.state is InstanceState.READY
        assert report.gauges["num_blocks"] == 2
        assert report.gauges["used_bytes"] == 2 * BLOCK_BYTES
        assert report.gauges["arriving_bytes"] == BLOCK_BYTES
        assert report.gauges["capacity_bytes"] == 10 * BLOCK_BYTES
        assert report.gauges["num_puts"] == 1
        assert store.count("used_bytes") == 2 * BLOCK_BYTES
        assert store.runtime.health.readiness().ok


async def test_it_drains_when_told_to(world: World) -> None:
    heard: list[Message] = []

    async def hear(message: Message, subject: str) -> None:
        heard.append(message)

    bus = await world.bus()
    async with Store(world) as store:
        instance = store.settings.instance
        await bus.subscribe(subjects.load("kvstore", instance), hear)
        await store.client.put(keys_of("a"))
        await store.stored(1)
        await store.client.offer(keys_of("never sent"))
        transfer_id, _ = await store.client.ask(keys_of("a"))
        drain = Drain(reason="test")
        await bus.request(subjects.control(instance, "drain"), drain, Done, timeout_s=TIMEOUT_S)
        await store.runtime.wait_until_stopping()
        receiving = asyncio.create_task(store.client.receive(transfer_id))
    assert len(await receiving) == 3, "a get under way is finished"
    await until(lambda: isinstance(heard[-1], InstanceExited))
    reports = [message for message in heard if isinstance(message, ServiceReport)]
    assert reports[-1].state is InstanceState.DRAINING
    with pytest.raises(NoResponder):
        await store.client.lookup(keys_of("a"))


async def test_a_transfer_that_was_given_up_is_not_waited_for_here(memory: MemoryWorld) -> None:
    async with Store(memory) as store:
        await store.client.put(keys_of("a"))
        await store.stored(1)
        transfer_id, _ = await store.client.ask(keys_of("a"), timeout_s=600.0)
        store.client.transport.discard(transfer_id)
        with pytest.raises(TransferTimeout):
            await store.client.receive(transfer_id)
        assert (await store.report()).gauges["num_gets"] == 0


def test_the_store_has_no_torch() -> None:
    code = (
        "import sys, services.kvstore.service\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
