"""Two workers' engines and their ``StoreClient`` around one KV store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.kvstore.config import KVStoreSettings
from services.kvstore.service import KVStoreService
from shared.config import BUNDLED_MODEL
from shared.core.request import Request
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.outputs import KVExport, StepOutput
from shared.engine.thread import EngineThread
from shared.worker.store_client import StoreClient
from tests.engines import make_request
from tests.integration.bus_rig import until
from tests.integration.service_rig import World, open_world

TIMEOUT_S = 30.0
PROMPT = tuple(3 + n * 37 % 8000 for n in range(200))


@pytest.fixture(params=["memory", "real"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as world:
        yield world


class Worker:
    """An engine with a store client, as ``shared.worker`` puts them together."""

    def __init__(self) -> None:
        self.exports: list[KVExport] = []
        self.tokens: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        config = EngineConfig(
            model_path=str(BUNDLED_MODEL), dtype="fp32", device="cpu", num_blocks=16
        )
        self.engine = EngineThread(
            lambda progress: build_engine(
                config, kv_sink=self.exports.append, on_progress=progress
            ),
            on_output=self._on_output,
            on_fatal=lambda error: None,
            num_threads=1,
        )

    def _on_output(self, step: StepOutput) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._take, step)

    def _take(self, step: StepOutput) -> None:
        for output in step.outputs:
            assert output.error is None
            self.tokens += output.token_ids
            if output.finish_reason is not None:
                self._ended.set()

    async def open(self, world: World, store: str) -> None:
        info = await asyncio.wrap_future(self.engine.start())
        self.client = StoreClient(
            await world.bus(),
            await world.transport(),
            self.engine,
            info.layout,
            fingerprint=info.spec.fingerprint,
            timeout_s=TIMEOUT_S,
            piece_timeout_s=TIMEOUT_S,
        )
        self.client.stores = (store,)

    async def serve(self, request: Request) -> tuple[int, list[int]]:
        """Fetch what is stored, compute the rest; the tokens fetched, and those generated."""
        self.tokens, self._ended = [], asyncio.Event()
        self.exports.clear()
        plan = self.client.plan(request)
        assert plan is not None
        num_fetched = await self.client.fetch(request, plan)
        await asyncio.wrap_future(
            self.engine.call(
                lambda e: (
                    e.start_reserved(request, num_computed_tokens=num_fetched, export=True)
                    if num_fetched
                    else e.add(request, export=True)
                )
            )
        )
        async with asyncio.timeout(TIMEOUT_S):
            await self._ended.wait()
        self.client.offer(plan, list(self.exports))
        return num_fetched, self.tokens


@asynccontextmanager
async def working(world: World, store: str) -> AsyncIterator[Worker]:
    worker = Worker()
    try:
        await worker.open(world, store)
        yield worker
        worker.client.close()
    finally:
        assert await asyncio.to_thread(worker.engine.stop, TIMEOUT_S)


async def test_what_one_worker_computed_another_one_fetches(world: World) -> None:
    settings = KVStoreSettings.load(**world.settings())
    store = KVStoreService(
        settings, open_bus=world.open_bus, make_transport=lambda _: world.new_transport()
    )
    request = make_request("first", PROMPT, max_tokens=8, tenant="a")
    async with world.running(store, settings) as runtime, working(world, settings.instance) as one:
        num_fetched, expected = await one.serve(request)
        assert num_fetched == 0
        stored = "banyan_kvstore_stored_blocks_total"
        await until(lambda: runtime.metrics.value(stored) == 3)

        async with working(world, settings.instance) as other:
            assert await other.serve(request) == (192, expected)
            assert other.client.num_hit_blocks == 3
            stranger = make_request("third", PROMPT, max_tokens=8, tenant="b")
            assert await other.serve(stranger) == (0, expected), "tenants share nothing"
            assert other.client.num_failures == 0
        assert one.client.num_failures == 0
        assert runtime.metrics.value("banyan_kvstore_incomplete_put_transfers_total") == 0
