"""One choice of a response: token events in, text to show out."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.detokenizer import IncrementalDetokenizer
from services.gateway.generation import TokenEvent
from services.gateway.stop import StopMatcher
from shared.core.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The logprobs of one shown token, which begins ``text_offset`` characters into the text."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """What one event added to a choice. ``finish_reason`` is set in its last delta."""

    index: int
    text: str
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None


class Choice:
    """Detokenises one output, stops it at a stop string, and counts its tokens.

    The token that ended the generation, and everything from a stop string on, is neither in the
    text nor in the logprobs; it is counted, since it was generated. Text of the first
    ``min_tokens`` tokens cannot stop the output.
    """

    def __init__(
        self,
        *,
        index: int,
        detokenizer: IncrementalDetokenizer,
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
        has_logprobs: bool = False,
    ) -> None:
        self.index = index
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop_strings)
        self._min_tokens = min_tokens
        self._has_logprobs = has_logprobs
        self._pending: deque[PositionLogprobs] = deque()
        self._num_decoded_chars = 0
        self._num_shown_chars = 0

    def feed(self, event: TokenEvent) -> ChoiceDelta:
        """What ``event`` adds; after a delta with a ``finish_reason`` nothing may be fed."""
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        num_shown = len(event.token_ids)
        if event.finish_reason is FinishReason.STOP:
            num_shown -= 1
        text, is_stopped = "", False
        for position, token_id in enumerate(event.token_ids):
            self.num_output_tokens += 1
            if position >= num_shown:
                break
            if self._has_logprobs and event.logprobs is not None:
                self._pending.append(
                    PositionLogprobs(token_id, event.logprobs[position], self._num_decoded_chars)
                )
            shown, is_stopped = self._show(self._detokenizer.feed(token_id))
            text += shown
            if is_stopped:
                break
        if event.finish_reason is not None and not is_stopped:
            shown, is_stopped = self._show(self._detokenizer.flush())
            text += shown if is_stopped else shown + self._stop.flush()
        self._num_shown_chars += len(text)
        finish_reason = FinishReason.STOP if is_stopped else event.finish_reason
        return ChoiceDelta(
            index=self.index,
            text=text,
            logprobs=self._release(is_all=finish_reason is not None and not is_stopped),
            finish_reason=finish_reason,
        )

    def _show(self, text: str) -> tuple[str, bool]:
        """What of the text so far may be shown, and whether a stop string was found."""
        self._num_decoded_chars += len(text)
        if self.num_output_tokens <= self._min_tokens:
            return self._stop.skip(text), False
        scan = self._stop.feed(text)
        return scan.text, scan.is_stopped

    def _release(self, *, is_all: bool) -> tuple[PositionLogprobs, ...]:
        """The logprobs of the tokens whose text is shown, and with ``is_all`` of the others."""
        released: list[PositionLogprobs] = []
        while self._pending and (is_all or self._pending[0].text_offset < self._num_shown_chars):
            released.append(self._pending.popleft())
        return tuple(released)
