"""How often a request has each token: what penalties need, kept from step to step."""

from array import array
from collections.abc import Iterable, Sequence


class TokenCounts:
    """The distinct tokens of one sequence, each with its number of occurrences in the output.

    ``token_ids`` and ``output_counts`` (64-bit integers, same length) belong together; a token that
    only the prompt has counts 0. Both are live: they change with the next ``update``, and nobody
    may hold their buffers over it.
    """

    def __init__(self, prompt_token_ids: Iterable[int], prompt_len: int) -> None:
        """``prompt_token_ids`` are to be listed (all, or none if only the output matters).

        The output begins at ``prompt_len``.
        """
        self._prompt_token_ids = array("q", dict.fromkeys(prompt_token_ids))
        self._prompt_len = prompt_len
        self._num_counted = 0
        self._clear()

    def update(self, token_ids: Sequence[int]) -> None:
        """Count what is new in ``token_ids`` (prompt and output) since the last call.

        Costs what the new tokens cost, or a recount if the sequence has become shorter. It may
        only grow behind what was counted or shrink: between two different continuations of the
        same tokens this is called with what they have in common.
        """
        if len(token_ids) < self._num_counted:
            self._clear()
        for index in range(self._num_counted, len(token_ids)):
            token = token_ids[index]
            place = self._places.setdefault(token, len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(token)
                self.output_counts.append(0)
            self.output_counts[place] += 1
        self._num_counted = max(self._prompt_len, len(token_ids))

    def _clear(self) -> None:
        self.token_ids = self._prompt_token_ids[:]
        self.output_counts = array("q", bytes(8 * len(self.token_ids)))
        self._places = {token: place for place, token in enumerate(self.token_ids)}
        self._num_counted = self._prompt_len
