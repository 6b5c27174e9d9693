"""Between the scheduler and the output-length predictors."""

from shared.messages.base import Message


class PredictLength(Message, frozen=True, kw_only=True):
    """How long will this request's output be?

    Publisher: the leading scheduler. Subscriber: one of the predictors (queue group), on
    ``predict``. Delivery: request/reply; never awaited by dispatch. Idempotent.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int


class LengthPrediction(Message, frozen=True, kw_only=True):
    """A distribution over output lengths.

    Publisher: the predictor. Subscriber: the asking scheduler. Delivery: reply. Idempotency key:
    ``request_id``. ``bucket_edges`` are the upper edges in tokens, ``probabilities`` one more
    (the last bucket is open); ``p50_tokens`` and ``p90_tokens`` are its quantiles, never above
    ``max_tokens``.
    """

    request_id: str
    predictor: str
    bucket_edges: tuple[int, ...]
    probabilities: tuple[float, ...]
    p50_tokens: int
    p90_tokens: int
