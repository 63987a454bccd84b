"""MiTA's forward on sequences of some hundred tokens: a whole head in one block of threads, two of
which fit on a multiprocessor (`mita_stream.cu`). Each number of tokens is compiled for anew, which
takes the host about a second.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mitaswap.kernels import nvrtc
from mitaswap.kernels.mita_call import Saved, Sizes
from mitaswap.kernels.mita_head import arguments, plain, room, terms_of
from mitaswap.kernels.mita_head import fixed as fixed_head
from mitaswap.kernels.tiles import ceil

THREADS = 256
#: tokens of a head at most
MOST = 2048


def _bytes(tokens: int, sizes: Sizes, dtype: torch.dtype, stages: int) -> int:
    m, rows = sizes.m, ceil(tokens, 16) * 16
    scores = m * (ceil(max(tokens, rows // 2 + THREADS) - 4, 16) * 16 + 4) * 4
    first = ceil(max(scores, THREADS * 8 * stages * sizes.top), 128) * 128
    rest = max((terms_of(dtype) - 1) * m * 128, m * 128 + 2 * rows)
    return first + m * 128 + rest + rows + m * 64 + 2 * 128 + (m + tokens // 64 + 3) * 4


def shape_of(tokens: int, sizes: Sizes, dtype: torch.dtype, room: int) -> tuple[int, int]:
    """Shared memory of a block, BYTES of `mita_stream.cu`, and its STAGES, so that two blocks fit
    into `room` bytes; 0 bytes where they do not.
    """
    for stages in (2, 1):
        bytes = _bytes(tokens, sizes, dtype, stages)
        if 2 * (bytes + 1024) <= room:  # what the device takes of each block's
            return bytes, stages
    return 0, 1


def suits(q: Tensor, sizes: Sizes, scale: float, again: float) -> bool:
    """Whether this kernel computes such calls, wherever they lie."""
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] == 64
    few = q.shape[2] <= MOST and sizes.m <= 32 and 0 < sizes.top <= 32
    return half and few and sizes.s == 1 and scale > 0 and again > 0


@functools.cache
def both(device: int) -> int:
    """Bytes of shared memory of a multiprocessor; 0 where such kernels cannot run."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_multiprocessor", 0)) if room(device) else 0


def fits(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, scale: float, again: float) -> bool:
    """Whether this kernel takes such a call here; what it does not take is for the long way."""
    if not q.is_cuda or not suits(q, sizes, scale, again) or not plain(q, k, v):
        return False
    return shape_of(q.shape[2], sizes, q.dtype, both(q.device.index))[0] > 0


def fixed(q: Tensor, sizes: Sizes, save: bool, stages: int) -> tuple[tuple[str, int], ...]:
    """The whole numbers that the kernel is compiled for."""
    return (*fixed_head(q, sizes, save), ("STAGES", stages))


def stream_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved | None, sizes: Sizes, scale: float,
    again: float,
) -> None:  # fmt: skip
    """Write the output [B, H, N, D] and, where given, the tensors of `saved`."""
    batch, heads, tokens, _ = q.shape
    bytes, stages = shape_of(tokens, sizes, q.dtype, both(q.device.index))
    numbers = fixed(q, sizes, saved is not None, stages)
    run = nvrtc.kernel("mita_stream.cu", numbers, bytes, q.device.index)
    run(batch * heads, THREADS, arguments(q, k, v, out, saved, scale, again))
