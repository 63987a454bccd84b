"""MiTA's gradients on short sequences: a whole head in one block of threads
(`mita_head_backward.cu`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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


class Shape(NamedTuple):
    """How a head is cut.

    Args:
        own: tiles of 16 tokens of a warp.
        parts: in which the gradients of the queries are computed.
    """

    own: int
    parts: int

    def threads(self, tokens: int) -> int:
        """Threads of a block."""
        return 32 * ceil(tokens, 16 * self.own)

    def shared_bytes(self, q: Tensor, sizes: Sizes) -> int:
        """Shared memory of a block: BYTES of `mita_back_parts.cuh`."""
        tiles = ceil(q.shape[2], 16)
        rows = 16 * tiles
        part = min(tiles, self.own * ceil(ceil(tiles, self.own), self.parts))
        logits = rows * (32 * part + 16)
        wide = 3 * rows * 80 if sizes.shared else 0
        terms = (terms_of(q.dtype) + 2) * 32 * 128
        return 4 * rows * 128 + terms + max(logits, wide) + 16 * rows + 32 * 20


@functools.cache
def multiprocessors(device: int) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shape_of(q: Tensor, sizes: Sizes, room: int) -> Shape | None:
    """The fewest parts for which a block's memory has room.

    A warp reads less of it with two tiles, but a block that is alone on a multiprocessor needs
    more warps; beyond 192 tokens, registers are too few for one tile and more warps (times:
    design 30 of reports/h100-kernels/NOTES.md).
    """
    for parts in range(1, MOST_PARTS + 1):
        bytes = Shape(2, parts).shared_bytes(q, sizes)
        if bytes <= room:
            alone = 2 * bytes > room and q.shape[2] <= 192
            return Shape(1, parts) if alone else Shape(2, parts)
    return None


def fits(
    tensors: tuple[Tensor, ...], saved: Saved, sizes: Sizes, scale: float, again: float
) -> bool:
    """Whether this kernel takes such a call here; what it does not take is for `short_backward`.

    Args:
        tensors, saved: as `head_backward` takes them.
    """
    q = tensors[1]
    if not q.is_cuda or not fits_short(q, sizes, scale, again) or not plain(*tensors):
        return False
    if saved.values.data_ptr() % 16 or saved.exact.data_ptr() % 16:  # a hook may have packed them
        return False
    return shape_of(q, sizes, room(q.device.index)) is not None


def fixed(q: Tensor, sizes: Sizes, shape: Shape) -> tuple[tuple[str, int], ...]:
    """The whole numbers that the kernel is compiled for."""
    return (
        ("BF16", int(q.dtype == torch.bfloat16)), ("TOKENS", q.shape[2]), ("M", sizes.m),
        ("K", sizes.top), ("FIRST", sizes.first), ("HEIGHT", sizes.height),
        ("WIDTH", sizes.width), ("A", sizes.a), ("B", sizes.b), ("SHARED", sizes.shared),
        ("OWN", shape.own), ("PARTS", shape.parts),
    )  # fmt: skip


def arguments(
    tensors: tuple[Tensor, ...], saved: Saved, ahead: int, scale: float, again: float
) -> list[Argument]:
    """The kernel's arguments, in its order. ahead: blocks that the device holds at most."""
    read = (saved.lse, saved.values, saved.exact, saved.probe_lse, saved.members, saved.route)
    return [
        *map(pointer, (*tensors, *read)),
        *(step for x in tensors for step in steps(x)),
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
    device = q.device.index
    shape = shape_of(q, sizes, room(device))
    assert shape is not None
    bytes = shape.shared_bytes(q, sizes)
    run = nvrtc.kernel("mita_head_backward.cu", fixed(q, sizes, shape), bytes, device)
    ahead = multiprocessors(device) * (room(device) // bytes)
    given = arguments(tensors, saved, ahead, scale, again)
    run(q.shape[0] * q.shape[1], shape.threads(q.shape[2]), given)
