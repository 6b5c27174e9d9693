"""How attempts that begin here join the engine: any number of them between two iterations."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.request import Request
from shared.engine.engine import Engine
from shared.engine.thread import EngineThread
from shared.errors import BanyanError

INFRASTRUCTURE_ERRORS = (BanyanError, TimeoutError, ValueError)
"""What may go wrong around an attempt without being its fault: it goes on elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Newcomer:
    """What the engine is told of an attempt.

    The first ``num_stored_tokens`` tokens have their KV in a reservation of its name; without any
    there is none. ``prefill_only`` and ``export`` as in ``Engine.add``.
    """

    request: Request
    num_stored_tokens: int
    prefill_only: bool
    export: bool


async def join(thread: EngineThread, newcomers: Sequence[Newcomer]) -> list[Exception | None]:
    """Queue ``newcomers`` in one call, so that all of them can be in the next batch.

    Returns what was wrong with each, one of ``INFRASTRUCTURE_ERRORS``; the others are queued.
    """
    try:
        return await asyncio.wrap_future(
            thread.call(lambda engine: [_add(engine, newcomer) for newcomer in newcomers])
        )
    except INFRASTRUCTURE_ERRORS as error:
        return [error] * len(newcomers)


def _add(engine: Engine, newcomer: Newcomer) -> Exception | None:
    request, num_stored_tokens = newcomer.request, newcomer.num_stored_tokens
    try:
        if num_stored_tokens:
            engine.start_reserved(
                request,
                num_computed_tokens=num_stored_tokens,
                prefill_only=newcomer.prefill_only,
                export=newcomer.export,
            )
        else:
            engine.add(request, prefill_only=newcomer.prefill_only, export=newcomer.export)
    except INFRASTRUCTURE_ERRORS as error:
        return error
    return None
