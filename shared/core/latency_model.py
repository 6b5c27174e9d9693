"""How long an iteration takes: a fitted roofline for engine, scheduler, placer and simulator.

The roofline (Williams, Waterman, Patterson, CACM 2009) says that work is bound by arithmetic or by
memory, whichever takes longer. One iteration is modelled as ::

    step_s = base_s                                        all weights read once, and overhead
           + (1 - h) · rows_s(num tokens) + h · rows_s(num sampled)    what more rows cost
           + num_chunks · chunk_s + num_decode · decode_request_s
           + causal FLOPs · causal_s_per_flop              prompt tokens attending to their chunk
           + prefix FLOPs · prefix_s_per_flop              … and to what came before it
           + chunk prefix bytes · prefix_kv_s_per_byte
           + decode context bytes · decode_kv_s_per_byte

``h`` is the head's share of the weights: it is computed for sampled tokens only. Deviations from
the plain roofline: the time of the matrix products over the number of rows is not drawn through
two constants (flat, then rising) but measured at a few knots, since the products of a few rows
reach neither roof; it never falls. Attention is added, not overlapped: it reads KV instead of
weights. No term is negative, so more work never takes less time. A fit is in ``latency_fit``, what
follows a running engine in ``latency_online``.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

from shared.core.step_work import StepWork

FORMAT_VERSION = 1


class StepFeatures(NamedTuple):
    """A step's work in rows, FLOPs, bytes and counts: what the constants apply to."""

    num_rows: int
    num_sampled: int
    head_share: float
    causal_flops: float
    prefix_flops: float
    prefix_kv_bytes: float
    decode_kv_bytes: float
    num_chunks: int
    num_decode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWindow:
    """``share`` of the layers looks back ``num_tokens`` (own included), ``None`` for all."""

    num_tokens: int | None
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a model costs, whatever the machine.

    ``layer_param_bytes`` are the weights that every step reads, ``head_param_bytes`` those of the
    head, which is computed for sampled tokens only; the embedding is looked up and costs nothing.
    ``layer_flops_per_token`` and ``head_flops_per_token`` are FLOPs of matrix products (2 a
    weight), ``attention_flops_per_pair`` those of one token looking at one token in all layers.
    """

    num_layers: int
    layer_param_bytes: int
    head_param_bytes: int
    layer_flops_per_token: float
    head_flops_per_token: float
    attention_flops_per_pair: float
    kv_bytes_per_token: int
    windows: tuple[AttentionWindow, ...] = (AttentionWindow(num_tokens=None, share=1.0),)

    @property
    def param_bytes(self) -> int:
        """Weights that a decode step reads."""
        return self.layer_param_bytes + self.head_param_bytes

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the matrix products for a token that is sampled from."""
        return self.layer_flops_per_token + self.head_flops_per_token

    def features(self, work: StepWork) -> StepFeatures:
        """``work`` in FLOPs and bytes.

        Of the decodes only the sum of their contexts is known: a sliding window cuts its mean.
        """
        causal = prefix = prefix_context = decode_context = 0.0
        for window in self.windows:
            limit = window.num_tokens
            for start, end in work.chunks:
                own = _pairs(0, end - start, limit)
                causal += window.share * own
                prefix += window.share * (_pairs(start, end, limit) - own)
                prefix_context += window.share * (start if limit is None else min(start, limit - 1))
            total = float(work.decode_context_tokens)
            if limit is not None:
                total = min(total, float(limit * work.num_decode))
            decode_context += window.share * total
        return StepFeatures(
            num_rows=work.num_batched_tokens,
            num_sampled=work.num_sampled_chunks + work.num_decode,
            head_share=self.head_flops_per_token / self.flops_per_token,
            causal_flops=causal * self.attention_flops_per_pair,
            prefix_flops=prefix * self.attention_flops_per_pair,
            prefix_kv_bytes=prefix_context * self.kv_bytes_per_token,
            decode_kv_bytes=decode_context * self.kv_bytes_per_token,
            num_chunks=len(work.chunks),
            num_decode=work.num_decode,
        )


class StepTerms(NamedTuple):
    """A predicted step time, split; the sum is the prediction."""

    base_s: float
    rows_s: float
    requests_s: float
    prefill_attention_s: float
    decode_attention_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConstants:
    """What a machine takes for one model: the constants of the formula above, none negative.

    ``rows`` are the knots of ``rows_s``: (number of rows, seconds on top of ``base_s`` if all
    weights were applied to so many). The first is ``(1, 0.0)``, both numbers rise; between knots
    the curve is straight, behind the last one it goes on like before it.
    """

    base_s: float
    rows: tuple[tuple[int, float], ...]
    chunk_s: float
    decode_request_s: float
    causal_s_per_flop: float
    prefix_s_per_flop: float
    prefix_kv_s_per_byte: float
    decode_kv_s_per_byte: float

    def rows_s(self, num_rows: int) -> float:
        """Seconds on top of ``base_s`` for the matrix products of so many rows."""
        rows = self.rows
        if num_rows <= 1 or len(rows) < 2:
            return 0.0
        index = min(bisect_right(rows, (num_rows,)), len(rows) - 1)
        (low, low_s), (high, high_s) = rows[index - 1], rows[index]
        return low_s + (high_s - low_s) * (num_rows - low) / (high - low)

    def terms(self, features: StepFeatures) -> StepTerms:
        """The parts of a step's predicted time."""
        share = features.head_share
        return StepTerms(
            base_s=self.base_s,
            rows_s=(1.0 - share) * self.rows_s(features.num_rows)
            + share * self.rows_s(features.num_sampled),
            requests_s=features.num_chunks * self.chunk_s
            + features.num_decode * self.decode_request_s,
            prefill_attention_s=features.causal_flops * self.causal_s_per_flop
            + features.prefix_flops * self.prefix_s_per_flop
            + features.prefix_kv_bytes * self.prefix_kv_s_per_byte,
            decode_attention_s=features.decode_kv_bytes * self.decode_kv_s_per_byte,
        )

    def step_s(self, features: StepFeatures) -> float:
        """Predicted time of a step."""
        return sum(self.terms(features))

    def scaled(self, scales: StepTerms) -> "LatencyConstants":
        """The constants of a machine whose terms take ``scales`` times as long."""
        return LatencyConstants(
            base_s=self.base_s * scales.base_s,
            rows=tuple((count, extra_s * scales.rows_s) for count, extra_s in self.rows),
            chunk_s=self.chunk_s * scales.requests_s,
            decode_request_s=self.decode_request_s * scales.requests_s,
            causal_s_per_flop=self.causal_s_per_flop * scales.prefill_attention_s,
            prefix_s_per_flop=self.prefix_s_per_flop * scales.prefill_attention_s,
            prefix_kv_s_per_byte=self.prefix_kv_s_per_byte * scales.prefill_attention_s,
            decode_kv_s_per_byte=self.decode_kv_s_per_byte * scales.decode_attention_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyModel:
    """Predicted times of one model on one machine.

    ``max_num_batched_tokens`` is the engine's token budget, by which longer prompts are cut into
    chunks. The rest says what was measured: ``hardware`` in words, ``device``, torch's
    ``num_threads``, weights' ``dtype``, and the model's ``fingerprint``.
    """

    facts: ModelFacts
    constants: LatencyConstants
    max_num_batched_tokens: int
    hardware: str = ""
    device: str = ""
    num_threads: int = 0
    dtype: str = ""
    fingerprint: str = ""
    version: int = FORMAT_VERSION

    def step_s(self, work: StepWork) -> float:
        """Time of one iteration of any composition; 0 for none."""
        if work.num_batched_tokens == 0:
            return 0.0
        return self.constants.step_s(self.facts.features(work))

    def prefill_s(self, num_tokens: int, num_cached_tokens: int = 0) -> float:
        """Time to prefill one prompt of ``num_tokens`` alone, the first ones' KV being there.

        Raises ``ValueError`` unless ``0 <= num_cached_tokens <= num_tokens``.
        """
        if not 0 <= num_cached_tokens <= num_tokens:
            raise ValueError(f"{num_cached_tokens} cached of {num_tokens} tokens")
        starts = range(num_cached_tokens, num_tokens, self.max_num_batched_tokens)
        ends = [min(num_tokens, start + self.max_num_batched_tokens) for start in starts]
        return sum(
            self.step_s(StepWork.prefill(start, end, is_sampling=end == num_tokens))
            for start, end in zip(starts, ends, strict=True)
        )

    def decode_step_s(self, batch: int, context_tokens_total: int) -> float:
        """Time of one decode iteration of ``batch`` requests with contexts of that sum."""
        return self.step_s(StepWork.decode(batch, context_tokens_total))

    @property
    def bytes_per_s(self) -> float:
        """Weights read in a step of one row over its time: the least that memory delivers."""
        return self.facts.param_bytes / self.constants.base_s

    @property
    def flops_per_s(self) -> float:
        """FLOPs over time of the matrix products at the last knot: what arithmetic delivers."""
        num_rows, extra_s = self.constants.rows[-1]
        return num_rows * self.facts.flops_per_token / (self.constants.base_s + extra_s)

    def with_constants(self, constants: LatencyConstants) -> "LatencyModel":
        """The same model on a machine of other speed."""
        return replace(self, constants=constants)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises ``ValueError`` saying what is wrong with ``data``."""
        values = _known(cls, data)
        if values.get("version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError(f"version {values['version']!r}, this code reads {FORMAT_VERSION}")
        facts = _known(ModelFacts, values["facts"])
        if "windows" in facts:
            facts["windows"] = tuple(
                AttentionWindow(**_known(AttentionWindow, window)) for window in facts["windows"]
            )
        values["facts"] = ModelFacts(**facts)
        values["constants"] = _checked(_known(LatencyConstants, values["constants"]))
        return cls(**values)


def rough_constants(facts: ModelFacts, device: str) -> LatencyConstants:
    """An order of magnitude for a ``device`` that nobody has measured, to start a refit from."""
    flops_per_s, bytes_per_s = (3e14, 2e12) if device.startswith("cuda") else (2e11, 1e10)
    num_rows = 2048
    return LatencyConstants(
        base_s=1e-3 + facts.param_bytes / bytes_per_s,
        rows=((1, 0.0), (num_rows, num_rows * facts.flops_per_token / flops_per_s)),
        chunk_s=1e-4,
        decode_request_s=1e-5,
        causal_s_per_flop=4 / flops_per_s,
        prefix_s_per_flop=4 / flops_per_s,
        prefix_kv_s_per_byte=1 / bytes_per_s,
        decode_kv_s_per_byte=2 / bytes_per_s,
    )


def windows_of(sliding_windows: Iterable[int | None]) -> tuple[AttentionWindow, ...]:
    """The windows of a model's layers, each with the share of layers that have it."""
    counts: dict[int | None, int] = {}
    for window in sliding_windows:
        counts[window] = counts.get(window, 0) + 1
    total = sum(counts.values())
    return tuple(
        AttentionWindow(num_tokens=window, share=count / total) for window, count in counts.items()
    )


def _pairs(start: int, end: int, window: int | None) -> int:
    """How many tokens the tokens ``[start, end)`` look at in all, each at itself too."""

    def upto(count: int) -> int:
        if window is None or count <= window:
            return count * (count + 1) // 2
        return window * (window + 1) // 2 + (count - window) * window

    return upto(end) - upto(start)


def _known(kind: type, data: object) -> dict[str, Any]:
    """The fields of ``kind`` in ``data``; unknown ones are ignored, missing ones an error."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{data!r} where a {kind.__name__} was expected")
    known = {field.name: data[field.name] for field in fields(kind) if field.name in data}
    required = (field.name for field in fields(kind) if field.default is MISSING)
    missing = [name for name in required if name not in known]
    if missing:
        raise ValueError(f"{kind.__name__} without {', '.join(missing)}")
    return known


def _checked(values: dict[str, Any]) -> LatencyConstants:
    for name, value in values.items():
        if name != "rows" and not _is_number(value):
            raise ValueError(f"constants.{name} is {value!r}, must be a number not below 0")
    try:
        rows = tuple((int(count), float(extra_s)) for count, extra_s in values["rows"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"constants.rows: {error}") from error
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(rows))
    if rows[:1] != ((1, 0.0),) or not rising:
        raise ValueError(f"constants.rows {rows} must start with (1, 0.0) and rise")
    return LatencyConstants(**(values | {"rows": rows}))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.0
