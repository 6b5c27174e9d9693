"""Static batching: padded batches that run to their end, the setting of the UELLM thesis.

A batch is formed from what waits, as many as seats and blocks reach, when nothing runs. All its
prompts are padded to the longest and computed before anybody decodes; whoever ends early leaves a
row that is computed on until the last one has ended. Only then the next batch starts. This is what
a padded ``generate`` call does, so that the two settings can be compared inside one engine.

Siblings of a member (``siblings``) have a place in its batch, join it when the prompts are computed
and before anybody decodes, and so have no prompt to be padded.

Padding is computed, not only counted: it takes its share of the token budget and of the time. The
tokens are the same as ever. Deviations from a padded call: a row that has ended gives its blocks
back at once; a batch that outgrows the pool loses its last member to the next batch; logits of
padding are not computed.
"""

from dataclasses import dataclass

from shared.core.batch_plan import Chunk, Plan, Planner
from shared.core.engine_request import EngineRequest, EngineState
from shared.core.request import Request, RequestKey, SamplingParams

PAD_TOKEN_ID = 0
SCRATCH = "padding"
"""Owner of the one block that all padding writes to and reads from."""


@dataclass(slots=True)
class _Batch:
    """The batch that runs, as it was formed."""

    num_tokens: dict[RequestKey, int]
    """Of each member before its first token in this batch."""
    longest: int
    """The most tokens that a member had to prefill."""
    num_pad_tokens: int
    """Padding of prompts that is still to be computed."""


class StaticPlanner(Planner):
    """Plans for one padded batch at a time."""

    _batch: _Batch | None = None
    _deferred: tuple[EngineRequest, ...] = ()
    """Who has a place in the batch and waits for a sibling in it."""

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """``None``: which rows pad depends on who has ended."""
        return None

    def _choose(self) -> None:
        if not self._running:
            self._form_batch()
        batch = self._batch
        if batch is None or not self._running:
            return
        prefills = self._prefills(batch)
        if not prefills and batch.num_pad_tokens == 0 and self._deferred:
            self._join(batch)
            prefills = self._prefills(batch)
        if prefills or batch.num_pad_tokens > 0:
            # Padding is on the left, as it is where the prompts of a batch end together.
            self._pad_prompts(batch)
            for request in sorted(prefills, key=self._rank):
                if request.state is EngineState.RUNNING:
                    self._schedule(request)
        else:
            self._continue()
            self._pad_ended(batch)

    def _prefills(self, batch: _Batch) -> list[EngineRequest]:
        """Members that have not sampled in this batch."""
        return [
            request
            for request in self._running.values()
            if request.num_tokens <= batch.num_tokens[request.key]
        ]

    def _form_batch(self) -> None:
        """End the last batch and start the next."""
        if self._blocks.owns(SCRATCH):
            self._blocks.free(SCRATCH)
        self._deferred = ()
        self._admit([*self._swapped.values(), *self._waiting.values()])
        lengths = [request.num_uncomputed_tokens for request in self._running.values()]
        num_pad_tokens = 0
        num_rows = len(lengths) + len(self._deferred)
        if num_rows > 1 and self._blocks.num_free_blocks > 0:  # else there is no padding
            self._blocks.create(SCRATCH)
            self._blocks.allocate(SCRATCH, 1)
            num_pad_tokens = len(lengths) * max(lengths) - sum(lengths)
        self._batch = _Batch(
            num_tokens={key: request.num_tokens for key, request in self._running.items()},
            longest=max(lengths, default=0),
            num_pad_tokens=num_pad_tokens,
        )

    def _join(self, batch: _Batch) -> None:
        """Let those in whose prompt a sibling has computed, or has not and never will.

        Who still has to wait for another one stays deferred; who finds no blocks is left out.
        """
        deferred, self._deferred = self._deferred, ()
        self._admit([r for r in deferred if r.state in (EngineState.WAITING, EngineState.SWAPPED)])
        for key, request in self._running.items():
            batch.num_tokens.setdefault(key, request.num_tokens)

    def _on_admitted(self, request: EngineRequest) -> None:
        """Its turn comes when the batch is complete."""

    def _on_deferred(self, request: EngineRequest) -> None:
        self._deferred += (request,)

    def _has_room(self) -> bool:
        return len(self._running) + len(self._deferred) < self._limits.max_num_seqs

    def _pad_prompts(self, batch: _Batch) -> None:
        """Spend budget on what is left of the prompts' padding."""
        while batch.num_pad_tokens > 0 and self._draft.budget > 0:
            count = min(batch.num_pad_tokens, self._draft.budget, batch.longest)
            self._pad(0, count)
            batch.num_pad_tokens -= count

    def _pad_ended(self, batch: _Batch) -> None:
        """One row for each member that has ended, as long as the longest that has not."""
        chunks = self._draft.chunks
        if chunks and self._blocks.owns(SCRATCH):
            context_len = max(chunk.end for chunk in chunks)
            for _ in range(len(batch.num_tokens) - len(chunks)):
                self._pad(context_len - 1, context_len)

    def _pad(self, start: int, end: int) -> None:
        """Add a chunk of nobody's tokens; its table is the scratch block again and again."""
        request = _padding(len(self._draft.pad_chunks), end)
        (scratch,) = self._blocks.block_table(SCRATCH)
        table = (scratch,) * self._blocks.blocks_for(end)
        self._draft.pad_chunks.append(Chunk(request, start, end, False, table))
        self._draft.budget -= end - start


def _padding(index: int, num_tokens: int) -> EngineRequest:
    """A request that is in no table; ``index`` tells those of one plan apart."""
    key = RequestKey(SCRATCH, index)
    return EngineRequest(
        request=Request(
            request_id=key.request_id,
            attempt=key.attempt,
            prompt_token_ids=(PAD_TOKEN_ID,) * num_tokens,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        ),
        arrival=-1,
        root=b"",
        end_token_ids=frozenset(),
        max_num_tokens=num_tokens + 1,
    )
