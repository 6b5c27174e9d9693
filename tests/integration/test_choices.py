"""The choices of one call, from a gateway's tracker through scheduler and workers."""

import asyncio
from pathlib import Path

from services.gateway.generation import GenerationRequest
from shared.core.request import SamplingParams
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.workers import PrefillFinished
from tests.integration.service_rig import open_world
from tests.integration.test_takeover import MODEL, NUM_TOKENS, Rig, collect, rig_of

NUM_CHOICES = 4
BLOCK_SIZE = 64
PROMPT = tuple(5 + 7 * position % 900 for position in range(200))


async def generate(rig: Rig, name: str, *, is_one_call: bool) -> list[list[int]]:
    """The tokens of each choice."""
    requests = [
        GenerationRequest(
            request_id=f"{name}-{index}",
            index=index,
            model=MODEL,
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(
                max_tokens=NUM_TOKENS, temperature=1.0, seed=index, ignore_eos=True
            ),
            group_id=name if is_one_call else None,
        )
        for index in range(NUM_CHOICES)
    ]
    streams = await asyncio.gather(*(rig.tracker.submit(request) for request in requests))
    return list(await asyncio.gather(*(collect(stream) for stream in streams)))


async def test_choices_of_one_call_share_a_prefill_and_decode_on_their_own(tmp_path: Path) -> None:
    prefilled: dict[str, int] = {}

    async def hear(message: Message, subject: str) -> None:
        if isinstance(message, PrefillFinished):
            num_computed = message.num_prompt_tokens - message.num_cached_tokens
            prefilled[message.request_id] = num_computed

    async with open_world("memory", tmp_path) as world, rig_of(world) as rig:
        await rig.bus.subscribe(subjects.all_request_events(), hear)
        async with rig.real_leader():
            tokens = await generate(rig, "call", is_one_call=True)
            *others, first = sorted(prefilled.values())
            assert (len(others), first) == (NUM_CHOICES - 1, len(PROMPT))
            # Who came after the first one's end has taken full blocks from the cache.
            assert set(others) <= {1, len(PROMPT) % BLOCK_SIZE}
            assert tokens == await generate(rig, "same", is_one_call=False)
            assert len({tuple(own) for own in tokens}) > 1
            await rig.tracker.idle()
            await rig.all_blocks_are_free()
