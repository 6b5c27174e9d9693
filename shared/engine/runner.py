"""Launches planned batches: chunks in, sampled tokens and exported KV out."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from operator import sub

import torch
from torch import Tensor

from shared.core.batch_plan import Chunk
from shared.core.request import RequestKey
from shared.engine.attention import AttentionBackend, AttentionBatch
from shared.engine.chain import ModelChain
from shared.engine.columns import Columns
from shared.engine.flight import Flight, HostCopy, Part
from shared.engine.logit_adjustments import PLAIN_ROW, to_device
from shared.engine.outputs import KVExport, KVSink
from shared.engine.sampler import SamplingRow, sample_on_device
from shared.engine.select import make_layer_runner
from shared.errors import EngineError
from shared.kvcache.pool import KVPool

MaskSource = Callable[[Sequence[Chunk]], Tensor | None]
"""Says which tokens may come behind chunks that sample: ``True`` where one is allowed.

A bool tensor ``[num_chunks, vocab_size]`` on the host or the engine's device, or ``None`` where
all are. Asked once for each batch, with all tokens so far in ``chunk.request.token_ids``. If it
raises, it is asked for each request alone, and the ones for which it raises again fail.
"""


class ModelRunner:
    """Executes chunks of requests on a chain of layers. Knows nothing of queues.

    Nothing here waits for the device, but for the KV that is exported. ``launch_behind`` is not for
    runners with a ``mask_source``, which has to see the tokens.
    """

    def __init__(
        self,
        chain: ModelChain,
        pool: KVPool,
        backend: AttentionBackend,
        *,
        mask_source: MaskSource | None = None,
    ) -> None:
        self._chain = chain
        self._pool = pool
        self._backend = backend
        self._mask_source = mask_source
        self._columns = Columns(chain.device)
        self._run_layers = make_layer_runner(chain, backend)

    def launch(self, chunks: Sequence[Chunk], kv_sink: KVSink | None) -> Flight:
        """Start to compute ``chunks`` in one batch.

        If that fails each request is computed alone, to find the one whose fault it is. Raises
        ``EngineError`` only if the device itself has failed.
        """
        flight = Flight()
        exported: set[tuple[RequestKey, int]] = set()
        attempts = [list(chunks)]
        while attempts:
            attempt = attempts.pop(0)
            errors: dict[RequestKey, str] = {}
            try:
                part = self._launch(attempt, kv_sink, exported, errors)
            except torch.AcceleratorError as exc:
                raise EngineError(f"the device failed: {exc}") from exc
            except Exception as exc:
                if len(attempt) > 1:
                    attempts = [[chunk] for chunk in attempt]
                else:
                    flight.errors[attempt[0].key] = f"{type(exc).__name__}: {exc}"
            else:
                flight.errors |= errors
                if part is not None:
                    flight.parts.append(part)
        return flight

    def launch_behind(self, flight: Flight, chunks: Sequence[Chunk]) -> Flight | None:
        """Start to compute one more token of requests whose last token ``flight`` samples.

        ``None`` if that cannot be; then nothing was done. Raises as ``launch``.
        """
        rows = flight.rows_of(chunks)
        if rows is None:
            return None
        token_ids = flight.parts[0].token_ids
        if rows != list(range(len(token_ids))):
            token_ids = token_ids[to_device(torch.tensor(rows), token_ids.device)]
        try:
            part = self._launch(chunks, None, set(), {}, token_ids)
        except torch.AcceleratorError as exc:
            raise EngineError(f"the device failed: {exc}") from exc
        except Exception:
            # It will be launched again when its turn has come, and the error be somebody's.
            return None
        return None if part is None else Flight([part])

    def _launch(
        self,
        chunks: Sequence[Chunk],
        kv_sink: KVSink | None,
        exported: set[tuple[RequestKey, int]],
        errors: dict[RequestKey, str],
        token_ids: Tensor | None = None,
    ) -> Part | None:
        """Compute ``chunks`` in one batch; ``None`` if none of them samples.

        Running the same chunks again is harmless: KV is overwritten by itself, and ``exported``
        (request, layer), filled here, keeps exports from being repeated; ``errors`` gets those of
        single requests. ``token_ids`` are those to compute where they are not known to the host.
        Raises whatever goes wrong with the batch as a whole.
        """
        exporting = [chunk for chunk in chunks if chunk.request.is_exporting]

        def export(layer: int) -> None:
            for chunk in exporting:
                if chunk.key in errors or (chunk.key, layer) in exported:
                    continue
                try:
                    self._export(chunk, layer, kv_sink)
                except Exception as exc:  # reported as the failure of the request
                    errors[chunk.key] = f"the KV sink failed: {type(exc).__name__}: {exc}"
                exported.add((chunk.key, layer))

        sampling = [i for i, chunk in enumerate(chunks) if chunk.is_sampling]
        chosen = chunks if len(sampling) == len(chunks) else [chunks[i] for i in sampling]
        # Before the layers run: behind them the caches hold weights, and the host is slower.
        rows = [PLAIN_ROW if c.request.is_plain else self._sampling_row(c) for c in chosen]
        token_ids, batch = self._prepare(chunks, token_ids)
        hidden = self._chain.embed(token_ids, batch.positions)
        hidden = self._run_layers(
            0,
            self._chain.spec.num_layers,
            hidden,
            batch,
            on_layer=export if exporting and kv_sink is not None else None,
        )
        if not sampling:
            return None
        if len(sampling) < batch.cu_seqlens_q[-1]:
            last_rows = torch.tensor([batch.cu_seqlens_q[i + 1] - 1 for i in sampling])
            hidden = hidden[to_device(last_rows, hidden.device)]
        logits = self._chain.head(hidden)
        mask, find_best = self._mask(chosen, logits), self._chain.kernels.argmax
        sampled = sample_on_device(logits, rows, mask=mask, find_best=find_best)
        return Part(chosen, sampled.token_ids, HostCopy(sampled))

    def _prepare(
        self, chunks: Sequence[Chunk], token_ids: Tensor | None
    ) -> tuple[Tensor, AttentionBatch]:
        size = self._pool.layout.block_size
        requests, starts, ends, _, tables = zip(*chunks, strict=True)
        num_tokens = sum(ends) - sum(starts)
        numbers: list[int]
        cu_seqlens_q: Sequence[int]
        if num_tokens == len(chunks):  # one each, as nearly always
            cu_seqlens_q = range(num_tokens + 1)
            numbers = [t[p // size] * size + p % size for t, p in zip(tables, starts, strict=True)]
            numbers += starts
            if token_ids is None:
                numbers += [r.token_ids[p] for r, p in zip(requests, starts, strict=True)]
        else:
            cu_seqlens_q = [0, *accumulate(map(sub, ends, starts))]
            numbers = [
                table[p // size] * size + p % size
                for _, start, end, _, table in chunks
                for p in range(start, end)
            ]
            numbers += chain.from_iterable(map(range, starts, ends))
            for request, start, end, _, _ in chunks:
                numbers += request.token_ids[start:end]
        columns = self._columns.fill(numbers, num_tokens)
        batch = AttentionBatch(
            positions=columns[1],
            slot_mapping=columns[0],
            cu_seqlens_q=cu_seqlens_q,
            context_lens=ends,
            block_tables=tables,
            backend=self._backend,
        )
        return columns[2] if token_ids is None else token_ids, batch

    def _export(self, chunk: Chunk, layer: int, kv_sink: KVSink | None) -> None:
        lo, hi = chunk.export_range(self._pool.layout.block_size)
        if kv_sink is None or lo == hi:
            return
        kv_sink(
            KVExport(
                key=chunk.key,
                layer=layer,
                block_lo=lo,
                block_hi=hi,
                data=self._pool.export_blocks(layer, chunk.block_table[lo:hi]),
                is_last_chunk=chunk.is_sampling,
            )
        )

    def _mask(self, chunks: Sequence[Chunk], logits: Tensor) -> Tensor | None:
        mask = None if self._mask_source is None else self._mask_source(chunks)
        if mask is None:
            return None
        if mask.shape != logits.shape or mask.dtype is not torch.bool:
            raise ValueError(
                f"a mask of {mask.dtype} {list(mask.shape)} for logits {list(logits.shape)}"
            )
        return mask if mask.device == logits.device else to_device(mask, logits.device)

    def _sampling_row(self, chunk: Chunk) -> SamplingRow:
        request, params = chunk.request, chunk.request.request.sampling
        # Counted from the chunk: the token before it may not have arrived yet.
        position = chunk.end - request.num_prompt_tokens
        token_counts = request.count_tokens() if params.has_penalties else None
        return SamplingRow(params, position, self._chain.spec.eos_token_ids, token_counts)
