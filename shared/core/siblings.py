"""One prefill for all choices of a call with ``n > 1``.

Of siblings, requests of one group with one prompt, the first in the order computes the prompt while
the others wait. When it is computed they get its blocks, the partial last one too, copied on write:
each has only the prompt's last token to compute, for the first token that it samples itself.

Prompt sharing as in vLLM's parallel sampling (Kwon et al., SOSP 2023, section 4.4). Deviation:
siblings are requests of their own that come one by one, and whoever is late takes full blocks from
the prefix cache. Siblings are known by their group and not by equal prompts: requests of different
calls never wait for each other, nothing is hashed for a request that is alone, and without a prefix
cache calls share nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineRequest, EngineState


def awaits_sibling(
    request: EngineRequest,
    running: Iterable[EngineRequest],
    rank: Callable[[EngineRequest], Any],
) -> bool:
    """Whether a sibling that runs and goes before ``request`` computes the prompt of both.

    ``rank`` is the order. Nobody waits for somebody behind it, so no order is turned round, and
    whoever is first among siblings waits for none of them.
    """
    if request.request.group_id is None or request.state is not EngineState.WAITING:
        return False
    return request.num_prompt_tokens > 1 and any(
        _are_siblings(request, other)
        and other.num_computed_tokens < other.num_prompt_tokens
        and rank(other) < rank(request)
        for other in running
    )


def heirs(
    parent: EngineRequest, waiting: Iterable[EngineRequest], blocks: BlockManager
) -> list[EngineRequest]:
    """Siblings of ``parent`` that wait without blocks."""
    if parent.request.group_id is None:
        return []
    return [
        child for child in waiting if _are_siblings(parent, child) and not blocks.owns(child.key)
    ]


def share_prompt(
    parent: EngineRequest, waiting: Iterable[EngineRequest], blocks: BlockManager
) -> bool:
    """Give its ``heirs`` the blocks of ``parent``, whose prompt is computed.

    Takes no free block. They share the output of earlier attempts too, as far as it is the same;
    one token at least is left to compute. Returns whether anybody got any.
    """
    has_shared = False
    for child in heirs(parent, waiting, blocks):
        common = _num_common_tokens(parent, child)
        if common == 0:
            continue
        blocks.fork(parent.key, child.key, blocks.blocks_for(common))
        child.num_computed_tokens = common
        child.num_registered_blocks = common // blocks.block_size
        if not child.was_admitted:
            child.num_cached_tokens = common
        has_shared = True
    return has_shared


def _are_siblings(one: EngineRequest, other: EngineRequest) -> bool:
    group_id = one.request.group_id
    return (
        group_id is not None
        and other.request.group_id == group_id
        and other.root == one.root
        and other.request.prompt_token_ids == one.request.prompt_token_ids
    )


def _num_common_tokens(parent: EngineRequest, child: EngineRequest) -> int:
    """Leading tokens of ``child`` whose KV ``parent`` has, all but the last at most."""
    most = min(parent.num_computed_tokens, child.num_tokens - 1)
    common = min(child.num_prompt_tokens, most)
    while common < most and child.token_ids[common] == parent.token_ids[common]:
        common += 1
    return common
