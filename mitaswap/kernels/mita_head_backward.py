"""MiTA's gradients on short sequences: a whole head in one block of threads
(`mita_head_backward.cu`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mitaswap.kernels import nvrtc
from mitaswap.kernels.mita_call import Saved, Sizes
from mitaswap.kernels.mita_head import plain, room, steps, terms_of
from mitaswap.kernels.mita_short import fits as fits_short
from mitaswap.kernels.nvrtc import Argument, pointer, real, whole
from mitaswap.kernels.tiles import ceil

#: most parts in which the gradients of the queries are computed
MOST_PARTS = 4


def threads(tokens: int) -> int:
    """Threads of a block: a warp for each 16 tokens."""
    return 32 * ceil(tokens, 16)


def shared_bytes(q: Tensor, sizes: Sizes, parts: int) -> int:
    """Shared memory of a block: BYTES of `mita_back_parts.cuh`."""
    tiles = ceil(q.shape[2], 16)
    rows = 16 * tiles
    logits = rows * (32 * ceil(tiles, parts) + 16)
    wide = 3 * rows * 80 if sizes.shared else 0
    return (
        4 * rows * 128
        + (terms_of(q.dtype) + 2) * 32 * 128
        + max(logits, wide)
        + 16 * rows
        + 32 * 20
    )


@functools.cache
def multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def parts(q: Tensor, sizes: Sizes, room: int) -> int:
    """The fewest parts for which a block's memory has room; 0 where there are none."""
    every = range(1, MOST_PARTS + 1)
    return next((x for x in every if shared_bytes(q, sizes, x) <= room), 0)


def fits(tensors: tuple[Tensor, ...], sizes: Sizes, scale: float, again: float) -> bool:
    """Whether this kernel takes such a call here; what it does not take is for `short_backward`.

    Args:
        tensors: as `head_backward` takes them.
    """
    q = tensors[1]
    if not q.is_cuda or not fits_short(q, sizes, scale, again) or not plain(*tensors):
        return False
    return parts(q, sizes, room(q.device.index)) > 0


def fixed(q: Tensor, sizes: Sizes, parts: int) -> tuple[tuple[str, int], ...]:
    """The whole numbers that the kernel is compiled for."""
    return (
        ("BF16", int(terms_of(q.dtype) == 3)), ("TOKENS", q.shape[2]), ("M", sizes.m),
        ("K", sizes.top), ("FIRST", sizes.first), ("HEIGHT", sizes.height),
        ("WIDTH", sizes.width), ("A", sizes.a), ("B", sizes.b), ("SHARED", sizes.shared),
        ("PARTS", parts),
    )  # fmt: skip


def arguments(
    tensors: tuple[Tensor, ...], saved: Saved, ahead: int, scale: float, again: float
) -> list[Argument]:
    """The kernel's arguments, in its order. ahead: blocks that the device holds at once."""
    read = (saved.lse, saved.values, saved.exact, saved.probe_lse, saved.members, saved.route)
    return [
        *map(pointer, (*tensors, *read)),
        *(whole(step) for x in tensors for step in steps(x)),
        whole(tensors[0].shape[1]), whole(ahead), real(scale), real(again),
    ]  # fmt: skip


def head_backward(
    tensors: tuple[Tensor, ...], saved: Saved, sizes: Sizes, scale: float, again: float
) -> None:
    """Write the gradients of q, k and v, where `fits` says so.

    Args:
        tensors: [B, H, N, D]: the gradient of the output, q, k, v, the output; to be written, the
            gradients of q, k, v.
    """
    q = tensors[1]
    cut = parts(q, sizes, room(q.device.index))
    numbers, bytes = fixed(q, sizes, cut), shared_bytes(q, sizes, cut)
    run = nvrtc.kernel("mita_head_backward.cu", numbers, bytes, q.device.index)
    ahead = multiprocessors(q.device.index) * max(1, room(q.device.index) // bytes)
    given = arguments(tensors, saved, ahead, scale, again)
    run(q.shape[0] * q.shape[1], threads(q.shape[2]), given)
