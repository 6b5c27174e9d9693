"""Runs one planned batch: tensors in, sampled tokens and exported KV out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.core.batch_plan import Chunk
from shared.core.request import RequestKey, TokenLogprobs
from shared.engine.attention import AttentionBackend, AttentionBatch
from shared.engine.chain import ModelChain
from shared.engine.outputs import KVExport, KVSink
from shared.engine.sampler import SamplingRow, sample
from shared.errors import EngineError
from shared.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True)
class Sampled:
    """New tokens of one request; ``logprobs`` has one entry a token, or none was asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class ModelRunner:
    """Executes chunks of requests on a chain of layers. Knows nothing of queues."""

    def __init__(self, chain: ModelChain, pool: KVPool, backend: AttentionBackend) -> None:
        self._chain = chain
        self._pool = pool
        self._backend = backend

    def run_isolated(
        self, chunks: Sequence[Chunk], kv_sink: KVSink | None
    ) -> tuple[dict[RequestKey, Sampled], dict[RequestKey, str]]:
        """``run``, and if that fails each request alone, to find the one whose fault it is.

        Raises ``EngineError`` only if the device itself has failed.
        """
        exported: set[tuple[RequestKey, int]] = set()
        results: dict[RequestKey, Sampled] = {}
        errors: dict[RequestKey, str] = {}
        attempts = [list(chunks)]
        while attempts:
            attempt = attempts.pop(0)
            try:
                sampled, failed = self.run(attempt, kv_sink, exported)
            except torch.AcceleratorError as exc:
                raise EngineError(f"the device failed: {exc}") from exc
            except Exception as exc:
                if len(attempt) > 1:
                    attempts = [[chunk] for chunk in attempt]
                else:
                    errors[attempt[0].key] = f"{type(exc).__name__}: {exc}"
            else:
                results |= sampled
                errors |= failed
        return results, errors

    def run(
        self,
        chunks: Sequence[Chunk],
        kv_sink: KVSink | None,
        exported: set[tuple[RequestKey, int]],
    ) -> tuple[dict[RequestKey, Sampled], dict[RequestKey, str]]:
        """Compute ``chunks`` in one batch.

        Returns the tokens sampled and the errors of single requests. Running the same chunks again
        is harmless: KV is overwritten by itself, and ``exported`` (request, layer), filled here,
        keeps exports from being repeated. Raises whatever goes wrong with the batch as a whole.
        """
        errors: dict[RequestKey, str] = {}
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

        token_ids, batch = self._prepare(chunks)
        hidden = self._chain.embed(token_ids, batch.positions)
        hidden = self._chain.run_layers(
            0,
            self._chain.spec.num_layers,
            hidden,
            batch,
            on_layer=export if exporting and kv_sink is not None else None,
        )
        sampling = [i for i, chunk in enumerate(chunks) if chunk.is_sampling]
        if not sampling:
            return {}, errors
        last_rows = torch.tensor([batch.cu_seqlens_q[i + 1] - 1 for i in sampling])
        logits = self._chain.head(hidden[last_rows.to(hidden.device)])
        rows = [self._sampling_row(chunks[i]) for i in sampling]
        results: dict[RequestKey, Sampled] = {}
        for i, row in zip(sampling, sample(logits, rows), strict=True):
            key = chunks[i].key
            if row.error is not None:
                errors[key] = row.error
            elif key not in errors:
                logprobs = () if row.logprobs is None else (row.logprobs,)
                results[key] = Sampled((row.token_id,), logprobs)
        return results, errors

    def _prepare(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, AttentionBatch]:
        block_size = self._pool.layout.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens_q = [0]
        for chunk in chunks:
            table = chunk.block_table
            token_ids += chunk.request.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            slots += [
                table[position // block_size] * block_size + position % block_size
                for position in range(chunk.start, chunk.end)
            ]
            cu_seqlens_q.append(len(positions))
        device = self._chain.device
        batch = AttentionBatch(
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            cu_seqlens_q=cu_seqlens_q,
            context_lens=[chunk.end for chunk in chunks],
            block_tables=[chunk.block_table for chunk in chunks],
            backend=self._backend,
        )
        return torch.tensor(token_ids, device=device), batch

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

    def _sampling_row(self, chunk: Chunk) -> SamplingRow:
        request = chunk.request
        params = request.request.sampling
        return SamplingRow(
            params=params,
            position=request.num_output_tokens,
            eos_token_ids=self._chain.spec.eos_token_ids,
            token_counts=request.count_tokens() if params.has_penalties else None,
        )
