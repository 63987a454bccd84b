"""A call in two halves on two streams: each fills what the other's launches leave idle at their
ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: rows (B H N) from which a call is cut in two: with fewer, the host takes longer to launch twice
#: as many kernels than the device to run them
LEAST = 2**20
#: the same where launches are captured in a CUDA graph, whose replay costs the host nothing
LEAST_CAPTURED = 2**16


class Part(NamedTuple):
    """Some of a call's batch elements, or of its only one's heads.

    Args:
        axis: 0 for batch elements, 1 for heads.
        begin, end: which of them.
        heads: heads of the call.
    """

    axis: int
    begin: int
    end: int
    heads: int

    def of(self, x: Tensor) -> Tensor:
        """This part of x [B, H, N, D], a view."""
        return x.narrow(self.axis, self.begin, self.end - self.begin)

    def flat(self, x: Tensor) -> Tensor:
        """This part of x [B * H, ...], a view."""
        each = 1 if self.axis else self.heads
        return x[self.begin * each : self.end * each]


@functools.cache
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """A second stream for each first one: two that others use at once stay apart."""
    return torch.cuda.Stream(device)


def in_halves(q: Tensor, run: Callable[[Part], None]) -> None:
    """Call `run` for all of q [B, H, N, D], or for both halves of a large one, on two streams: what
    follows on the current stream waits for both. What outlives the call is allocated before.
    """
    batch, heads, tokens, _ = q.shape
    axis = 0 if batch > 1 else 1
    count = q.shape[axis]
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if count < 2 or batch * heads * tokens < (LEAST_CAPTURED if captured else LEAST):
        run(Part(axis, 0, count, heads))
        return
    # eights of batch elements, so that all that is cut begins as aligned as the whole: kernels are
    # compiled once
    half = count // 2 if count < 16 else count // 16 * 8
    first, second = Part(axis, 0, half, heads), Part(axis, half, count, heads)
    if not q.is_cuda:  # the interpreter has no streams
        run(first)
        run(second)
        return
    here = torch.cuda.current_stream(q.device)
    beside = _beside(q.device, here.cuda_stream)
    beside.wait_stream(here)
    try:
        with torch.cuda.stream(beside):
            run(second)
        run(first)
    finally:  # also where a launch fails: the other half may still be writing
        here.wait_stream(beside)
