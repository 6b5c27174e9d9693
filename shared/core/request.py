"""What a generation request is, for the engine, the wire and the simulator alike."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple

GREEDY_BELOW_TEMPERATURE = 1e-5
"""Logits divided by less than this leave float range; the limit of it all is greedy anyway."""


class RequestKey(NamedTuple):
    """Identity of one attempt at one request; everything about a request carries it.

    A restarted request keeps its ``request_id`` and gets ``attempt + 1``; whatever still arrives
    for an older attempt is dropped and counted.
    """

    request_id: str
    attempt: int


class FinishReason(StrEnum):
    """Why the engine stopped producing tokens for a request."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled (it is the last token emitted)."""
    LENGTH = "length"
    """``max_tokens`` or the model's context is used up."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    ``temperature`` 0 means greedy. ``top_k`` ``None`` means no limit; ``min_p`` cuts off tokens
    less likely than that share of the likeliest one's probability. ``max_tokens`` counts all
    output tokens of the request over its attempts. ``logprobs`` ``None`` means none, 0 the chosen
    token's only, k the k most likely beside it. ``seed`` is always set by the gateway, so that
    a random number is a function of (seed, position) and of nothing else. ``stop_token_ids`` are
    in addition to the model's own end-of-sequence tokens, which ``ignore_eos`` switches off.
    Below ``min_tokens`` output tokens no end-of-sequence or stop token can be sampled.

    ``repetition_penalty`` r divides the positive and multiplies the negative logits of every token
    in prompt or output (Keskar et al., CTRL, 2019, section 4.1, where negative ones are divided
    too). From the logit of a token that is c times in the output, ``frequency_penalty`` takes c
    times its value and ``presence_penalty`` its value once (OpenAI's definition). ``logit_bias``
    adds to logits: (token id, bias), each token once.

    What has its default value is not stored in the instance but read from the class: the wire
    carries what an instance stores, and so no byte for what was not asked for.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Drop what the class says already."""
        stored = self.__dict__
        for field in fields(self):
            if field.name in stored and stored[field.name] == field.default:
                del stored[field.name]

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens there are already."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for but the most likely token, wherever it is."""
        return (
            self.is_greedy
            and self.min_tokens == 0
            and self.logprobs is None
            and not self.logit_bias
            and not self.has_penalties
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position, of the model's unmodified distribution.

    ``top_ids``/``top_logprobs`` list the most likely tokens, best first.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What a request was promised; each ``None`` means no promise of that kind."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate, as the gateway hands it on.

    ``prompt_token_ids`` is what the caller sent; ``output_token_ids`` what earlier attempts have
    already emitted, so that attempt + 1 goes on at offset ``len(output_token_ids)``. ``group_id``
    joins the sub-requests of one call with ``n > 1``, which have one prompt. Smaller ``priority``
    goes first.
    """

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams
    slo: Slo = Slo()
    priority: int = 0
    tenant: str = ""
    group_id: str | None = None

    @property
    def key(self) -> RequestKey:
        """The identity of this attempt."""
        return RequestKey(self.request_id, self.attempt)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV a prefill of this attempt has to produce (or find cached)."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)
