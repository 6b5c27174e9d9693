"""The integers that go into a batch, as tensors."""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.engine.logit_adjustments import to_device


class Columns:
    """Columns of integers on a device.

    On a CPU the memory stays and so do the tensors, as long as the batches have one size: to make
    a tensor takes longer than to fill it, and there are decodes of half a millisecond.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_kept = device.type == "cpu"
        self._shape = (0, 0)
        self._memory = memoryview(array("q"))
        self._tensors: Sequence[Tensor] = ()

    def fill(self, numbers: Sequence[int], num_rows: int) -> Sequence[Tensor]:
        """``numbers``, one column after the other, as int64 tensors ``[num_rows]``.

        They are valid until the next call; on a GPU for as long as they are held.
        """
        shape = (len(numbers) // num_rows, num_rows)
        if not self._is_kept:
            columns = torch.from_numpy(np.array(numbers, dtype=np.int64).reshape(shape))
            return to_device(columns, self._device).unbind()
        if shape != self._shape:
            self._memory = memoryview(array("q", numbers))
            self._tensors = torch.frombuffer(self._memory, dtype=torch.int64).view(shape).unbind()
            self._shape = shape
        self._memory[:] = memoryview(array("q", numbers))
        return self._tensors
