"""MiTA's forward on short sequences: a whole head in one block of threads (`mita_head.cu`)."""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
from torch import Tensor

from mitaswap.kernels import nvrtc
from mitaswap.kernels.mita_call import Saved, Sizes
from mitaswap.kernels.mita_short import fits as fits_short
from mitaswap.kernels.nvrtc import NOWHERE, Argument, pointer, real, whole
from mitaswap.kernels.tiles import ceil

THREADS = 256


def terms_of(dtype: torch.dtype) -> int:
    """Terms of a landmark: TERMS of `mita_head_rows.cuh`, as `split` in mita_parts.py."""
    return 3 if dtype == torch.bfloat16 else 2


def shared_bytes(tokens: int, m: int, dtype: torch.dtype) -> int:
    """Shared memory of a block: BYTES of `mita_head.cu`."""
    rows = ceil(tokens, 16) * 16
    scores = m * max(40, rows + 8) * 4
    return (
        3 * rows * 128 + scores + terms_of(dtype) * 32 * 128 + m * 32 + 2 * 256 + 2 * 128 + 52 * 4
    )


@functools.lru_cache(maxsize=1024)
def _steps(shape: torch.Size, strides: tuple[int, ...]) -> tuple[Argument, ...]:
    """Strides of B, H and N in elements, as arguments; 0 for axes of one, which are never stepped
    along. None of them where rows cannot be read 16 bytes at a time, by 32-bit offsets.
    """
    found = [0 if size == 1 else step for size, step in zip(shape, strides, strict=True)][:3]
    ok = all(step % 8 == 0 and step < 2**31 for step in found) and shape[2] * found[2] < 2**31
    return tuple(map(whole, found)) if ok else ()


def steps(x: Tensor) -> tuple[Argument, ...]:
    """Strides of B, H and N as a kernel's arguments; none where `plain` is not so."""
    return _steps(x.shape, x.stride())


def plain(*tensors: Tensor) -> bool:
    """Whether rows of these [B, H, N, D] can be read 16 bytes at a time, with 32-bit offsets."""
    return all(x.data_ptr() % 16 == 0 and steps(x) for x in tensors)


@functools.cache
def room(device: int) -> int:
    """Bytes of shared memory that a block may have; 0 where such kernels cannot run."""
    if torch.cuda.get_device_capability(device) < (8, 0) or not nvrtc.serves(device):
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def suits(q: Tensor, sizes: Sizes, scale: float, again: float) -> bool:
    """Whether this kernel computes such calls, wherever they lie: those of the backward on short
    sequences, with at most 32 keys an expert.
    """
    return fits_short(q, sizes, scale, again) and sizes.top <= 32


def fits(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, scale: float, again: float) -> bool:
    """Whether this kernel takes such a call here; what it does not take is for the long way."""
    if not q.is_cuda or not suits(q, sizes, scale, again) or not plain(q, k, v):
        return False
    return shared_bytes(q.shape[2], sizes.m, q.dtype) <= room(q.device.index)


@functools.cache
def guess(tokens: int, top: int) -> tuple[int, int]:
    """Of `tokens` normal scores: how many standard deviations above the mean about as many as the
    kernel first chooses begin, and how much farther down one more; per mille.
    """
    normal = NormalDist()
    at = normal.inv_cdf(min(0.98, max(0.02, 1 - (top + 32) / 2 / tokens)))
    return round(1000 * at), round(1000 / (tokens * normal.pdf(at)))


def fixed(q: Tensor, sizes: Sizes, save: bool) -> tuple[tuple[str, int], ...]:
    """The whole numbers that the kernel is compiled for."""
    aim, step = guess(q.shape[2], sizes.top)
    return (
        ("BF16", int(q.dtype == torch.bfloat16)), ("TOKENS", q.shape[2]),
        ("M", sizes.m), ("K", sizes.top), ("FIRST", sizes.first),
        ("HEIGHT", sizes.height), ("WIDTH", sizes.width), ("A", sizes.a), ("B", sizes.b),
        ("AIM", aim), ("STEP", step), ("SHARED", sizes.shared), ("SAVE", int(save)),
    )  # fmt: skip


def arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved | None, scale: float, again: float
) -> list[Argument]:
    """The kernel's arguments, in its order; what is saved in that of `Saved`."""
    every = (step for x in (q, k, v, out) for step in steps(x))
    written = map(pointer, saved) if saved else [NOWHERE] * len(Saved._fields)
    return [
        *map(pointer, (q, k, v, out)), *written, *every, whole(q.shape[1]),
        real(scale), real(again),
    ]  # fmt: skip


def head_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved | None, sizes: Sizes, scale: float,
    again: float,
) -> None:  # fmt: skip
    """Write the output [B, H, N, D] and, where given, the tensors of `saved`."""
    batch, heads, tokens, _ = q.shape
    numbers = fixed(q, sizes, saved is not None)
    bytes = shared_bytes(tokens, sizes.m, q.dtype)
    run = nvrtc.kernel("mita_head.cu", numbers, bytes, q.device.index)
    run(batch * heads, THREADS, arguments(q, k, v, out, saved, scale, again))
