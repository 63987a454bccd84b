"""MiTA's plan of launches, forward and backward; none of them waits for the host.

On short sequences of halves each is one launch (`mita_head.cu`, `mita_head_backward.cu`), and the
forward of up to about a thousand tokens (`mita_stream.cu`). Else large calls go in two halves, and
the forward is mostly four: pool (landmarks), probe (landmark scores and V~ of all keys, or its
parts, routes of all queries), settle (top-k, V~ from its parts, counting sort of the queries),
attend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mitaswap.kernels.halves import Part, in_halves
from mitaswap.kernels.mita_attend import attend_kernel, merge_kernel
from mitaswap.kernels.mita_backward import (
    expert_backward_kernel,
    landmark_backward_kernel,
    query_backward_kernel,
    shared_backward_kernel,
)
from mitaswap.kernels.mita_call import Saved, Sizes, readable
from mitaswap.kernels.mita_head import fits as fits_head
from mitaswap.kernels.mita_head import head_forward
from mitaswap.kernels.mita_head_backward import fits as fits_head_backward
from mitaswap.kernels.mita_head_backward import head_backward
from mitaswap.kernels.mita_probe import (
    marks_kernel,
    pool_kernel,
    probe_kernel,
    windows_kernel,
)
from mitaswap.kernels.mita_settle import settle_kernel
from mitaswap.kernels.mita_short import fits, short_backward
from mitaswap.kernels.mita_stream import fits as fits_stream
from mitaswap.kernels.mita_stream import stream_forward
from mitaswap.kernels.mita_walk import walk_kernel
from mitaswap.kernels.tiles import ceil, like, power

#: forwards of whole heads in one launch, with what they take, in the order in which they are tried
WHOLE_HEADS = ((fits_head, head_forward), (fits_stream, stream_forward))
#: most bytes of landmark scores held at once, as a share of the bytes of q
SCORES_SHARE = 2.0
#: and the least that is worth another round of launches
SCORES_LEAST = 64 * 2**20


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def empty_saved(q: Tensor, sizes: Sizes) -> Saved:
    """The tensors of `Saved`, unwritten."""
    batch, heads, tokens, dim = q.shape
    bh, m, routed = batch * heads, sizes.m, int(sizes.top > 0)

    def whole(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.int32)

    return Saved(
        _floats(q, bh, tokens),
        q.new_empty(bh, m, dim),
        q.new_empty(bh, m, dim),
        _floats(q, bh, m, dim),
        _floats(q, bh, m),
        whole(bh, m, sizes.top),
        whole(bh, routed * (m + 1)),
        whole(bh, routed * sizes.s * tokens),
        whole(bh, routed * sizes.s, tokens),
    )


def sign(x: float) -> int:
    """-1, 0 or 1."""
    return (x > 0) - (x < 0)


def near(*tensors: Tensor) -> bool:
    """Whether the rows of each head of these [B, H, N, D] lie within 2^31 elements."""
    return all((x.shape[2] - 1) * x.stride(2) + x.shape[3] < 2**31 for x in tensors)


def group_width(tokens: int, top: int) -> int:
    """Neighbours whose maximum stands for them in a first choice of keys; 1: choose at once."""
    group = 8 if tokens < 2048 else min(64, max(16, power(ceil(tokens, 8192))))
    # worth it where most groups drop out
    return group if tokens >= 512 and 2 * top <= ceil(tokens, group) else 1


def token_tiles(tokens: int) -> tuple[int, int]:
    """Tokens that a program of the probe goes through, and programs. A class token beside 1,024
    patches is no reason for a third program.
    """
    few = max(1, tokens - 64)
    usual = max(512, power(ceil(few, 128)))
    tile = 64 * ceil(ceil(tokens, ceil(few, usual)), 64)
    return tile, ceil(tokens, tile)


def pool_parts(bh: int, tokens: int, m: int) -> int:
    """Programs per landmark: enough to fill the device, never for less than 64 rows each."""
    return max(1, min(ceil(1024, bh * m), tokens // m // 64, 16))


def _pool(
    q: Tensor, sizes: Sizes, marks: Tensor, terms: tuple[Tensor, Tensor, int], parts: int
) -> None:
    """Write the landmarks and their terms, from `parts` sums each."""
    batch, heads, tokens, dim = q.shape
    bh, m, block_d = batch * heads, sizes.m, power(dim, 16)
    at, windows = q.stride()[:3], (sizes.first, sizes.height, sizes.width, sizes.a, sizes.b)
    across = power(ceil(sizes.width, sizes.b) + 1)  # no window has more columns
    if parts == 1 and tokens < 2048 and across <= 16:
        windows_kernel[(bh * ceil(m, 4),)](
            q, marks, *terms, *at, heads, m, *windows, D=dim, BLOCK_D=block_d,
            BLOCK_W=4, BLOCK_Y=max(1, 16 // across), BLOCK_X=across, num_warps=1,
        )  # fmt: skip
        return
    sums = marks if parts == 1 else _floats(q, bh, m, parts, dim)
    pool_kernel[(bh * m * parts,)](
        q, sums, *terms, *at, heads, m, parts, *windows, D=dim, BLOCK_D=block_d,
        BLOCK_R=16 if tokens < 2048 else 64, num_warps=1 if tokens < 8192 else 4,
    )  # fmt: skip
    if parts > 1:
        marks_kernel[(bh * m,)](sums, marks, *terms, parts, D=dim, BLOCK_D=block_d, num_warps=1)


def _probe(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, scale: float, saved: Saved, every: int
) -> None:
    """Fill `saved` (but lse): everything that comes before the attention. `every`: heads of the
    whole call (of all images), which decide how sums are cut, so that halves sum alike.
    """
    batch, heads, tokens, dim = q.shape
    bh, m, top, s = batch * heads, sizes.m, sizes.top, sizes.s
    block_d = power(dim, 16)
    # landmarks as sums of terms in q's dtype, so that tensor cores multiply them about exactly
    rest = q.new_empty({torch.float32: 0, torch.float16: 1}.get(q.dtype, 2), bh, m, dim)
    terms = (saved.marks, rest, bh * m * dim)
    _pool(q, sizes, saved.exact, terms, pool_parts(every, tokens, m))

    wide = q.dtype == torch.float32 or block_d > 64
    # With four warps and blocks of 16 landmarks, ptxas (Triton 3.6, sm_90a) takes descriptors of
    # the product that ranks queries from a register nobody wrote, in some shapes: queries are lost
    # from the sorted order, and what attends follows whatever lies there. 32 are right.
    block_m = min(power(m, 16 if wide else 32), 64 if wide else 128)
    blocks_m = ceil(m, block_m)
    # blocks of 32 landmarks are too few rows for a warp group's product: two warps, that exchange
    # less, and six programs on a multiprocessor
    narrow = not wide and block_m <= 32
    tile, tiles = token_tiles(tokens)
    shared, routed, whole = bool(sizes.shared), bool(top), tiles == 1
    part_v, part_top, part_sum = saved.values, saved.probe_lse, saved.probe_lse
    if not whole:  # else the probe's only tile has all of V~
        part_v = _floats(q, bh, tiles, m, dim if shared else 0)
        part_top, part_sum = _floats(q, 2, bh, tiles, m)
    ranks = saved.order.new_empty(bh, s if routed else 0, tokens)
    hist = saved.order.new_empty(2, bh, tiles, m)
    group = group_width(tokens, top) if routed else 1
    groups = ceil(tokens, group)
    # scores of all heads at once where they are small, else of as many as memory is given to (half
    # of it to each half of a call, as both run at once)
    allowed = max(SCORES_LEAST * bh // every, int(SCORES_SHARE * q.numel() * q.element_size()))
    chunk = max(1, min(bh, allowed // (m * tokens * 4))) if routed else bh
    # rows begin at multiples of 64 bytes
    row, peak_row = ceil(tokens, 16) * 16, ceil(groups, 16) * 16
    scores = _floats(q, chunk if routed else 0, m, row)
    peaks = _floats(q, chunk if group > 1 else 0, m, peak_row)
    picked = ranks.new_empty(chunk if group > 1 else 0, m, top)
    block_l, block_c = power(groups), power(max(1, top * group)) if group > 1 else 1
    widest = max(block_l, block_c)
    warps = min(16, widest // 512) if widest > 1024 else 1
    for first in range(0, bh, chunk):
        now = min(chunk, bh - first)
        probe_kernel[(now * tiles, blocks_m + routed)](
            q, k, v, *terms, scores, peaks, part_v, part_top, part_sum,
            saved.route, ranks, hist[0], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            row, peak_row, heads, tokens, m, tiles, first, scale,
            S=s, G=group, D=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCKS_M=blocks_m,
            BLOCK_N=64, TILE=tile, ROUTED=routed, SHARED=shared, SIGN=sign(scale), WHOLE=whole,
            num_warps=8 if wide else 2 if narrow else 4,
            num_stages=2 if wide or (narrow and not whole) else 3,
            maxnreg=168 if narrow else None,
        )  # fmt: skip
        if not routed and (whole or not shared):
            continue
        settle_kernel[(now * m + now * tiles * routed,)](
            scores, peaks, picked, saved.members, part_v, part_top, part_sum, saved.values,
            saved.probe_lse, saved.route, ranks, hist[0], hist[1], saved.starts, saved.order,
            row, peak_row, tokens, m, groups, tiles, tile, now * m, first, scale,
            K=top, S=s, G=group, D=dim, BLOCK_D=block_d, BLOCK_L=block_l, BLOCK_C=block_c,
            BLOCK_T=min(32, power(tiles)), BLOCK_E=power(m), BLOCK_H=min(32, power(tiles)),
            BLOCK_I=256, ROUTED=routed, GATHER=shared and not whole,
            THREADS=32 * warps, num_warps=warps,
        )  # fmt: skip


def attend_tile(tokens: int, m: int, s: int) -> int:
    """Queries per tile: about what an expert gets, between 16 and 64."""
    return min(64, max(16, power(tokens * s // m)))


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, scale: float, again: float, save: bool
) -> tuple[Tensor, Saved | None]:
    """The output [B, H, N, D] and, if asked to `save` it, what the backward needs."""
    q, k, v = readable(q), readable(k), readable(v)
    out, some = like(q), q.shape[0] * q.shape[1] > 0
    for suitable, forward in WHOLE_HEADS:
        if suitable(q, k, v, sizes, scale, again):
            wanted = empty_saved(q, sizes) if save else None
            if some:
                forward(q, k, v, out, wanted, sizes, scale, again)
            return out, wanted
    saved = empty_saved(q, sizes)

    def run(part: Part) -> None:
        mine = Saved(*(part.flat(x) for x in saved))
        a, b, c = part.of(q), part.of(k), part.of(v)
        _probe(a, b, c, sizes, scale, mine, len(saved.lse))
        _attend(a, b, c, part.of(out), mine, sizes, scale, again, save)

    if some:
        in_halves(q, run)
    return out, saved if save else None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, sizes: Sizes, scale: float,
    again: float, save: bool,
) -> None:  # fmt: skip
    """Write the output [B, H, N, D] and `saved.lse` from what `_probe` left."""
    batch, heads, tokens, dim = q.shape
    bh, m, top, s = batch * heads, sizes.m, sizes.top, sizes.s
    block_d, routed = power(dim, 16), bool(top)
    # between the two, tiles of 32 would fit better, but are slower than either
    tile = 16 if routed and tokens * s <= 32 * m else 64
    tiles = s * tokens // tile + m if routed else ceil(tokens, tile)
    half, widest = q.element_size() == 2, max(m, top)
    narrow = widest <= (64 if half and block_d <= 64 else 32) and block_d <= 128
    if routed and s == 1 and tokens <= 4096 and narrow and near(q, k, v, out):
        programs = max(2, tokens // 256)
        walk_kernel[(bh * programs,)](
            q, k, v, saved.marks, saved.values, saved.members, saved.starts, saved.order, out,
            saved.lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            heads, tokens, programs, scale, again,
            M=m, K=top, D=dim, BLOCK_D=block_d, T=tile, BLOCK_M=power(m, 16),
            BLOCK_K=power(top, 16), SHARED=bool(sizes.shared), SAVE=save,
            SIGN=sign(scale), SHARED_SIGN=sign(again),
            num_warps=4 if tile > 16 else 1, num_stages=3 if half else 1,
        )  # fmt: skip
        return
    several = routed and s > 1
    into, lse, part = out, saved.lse, 0
    if several:
        into = _floats(q, s, batch, heads, tokens, dim)
        lse, part = _floats(q, s, bh, tokens), into.stride(0)
    so = into.stride()[-4:-1]
    attend_kernel[(bh * tiles,)](
        q, k, v, saved.marks, saved.values, saved.members, saved.starts, saved.order, into, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *so, part,
        heads, tokens, tiles, scale, again,
        M=m, K=top, S=s if routed else 1, D=dim, BLOCK_D=block_d, T=tile, BLOCK_E=power(m),
        BLOCK_C=min(128 if tile > 16 and block_d <= 64 else 64, power(m * sizes.shared + top, 16)),
        ROUTED=routed, SHARED=bool(sizes.shared), SAVE=save or several,
        num_warps=4 if tile > 16 else 1,
    )  # fmt: skip
    if several:
        tiles = ceil(tokens, 64)
        merge_kernel[(bh * tiles,)](
            into, lse, out, saved.lse, *out.stride()[:3], heads, tokens, bh, tiles,
            S=s, D=dim, BLOCK_D=block_d, BLOCK_N=64,
        )  # fmt: skip


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, sizes: Sizes,
    scale: float, again: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, each laid out like its tensor."""
    q, k, v, grad = readable(q), readable(k), readable(v), readable(grad)
    dq, dk, dv = (like(x) for x in (q, k, v))
    if not q.shape[0] * q.shape[1]:
        return dq, dk, dv
    every = (grad, q, k, v, out, dq, dk, dv)
    if fits_head_backward(every, saved, sizes, scale, again):
        head_backward(every, saved, sizes, scale, again)
        return dq, dk, dv
    short = fits(q, sizes, scale, again)

    def run(part: Part) -> None:
        mine = Saved(*(part.flat(x) for x in saved))
        given = [part.of(x) for x in every]
        if short:
            short_backward(*given, saved=mine, sizes=sizes, scale=scale, again=again)
        else:
            _backward(
                *given, saved=mine, sizes=sizes, scale=scale, again=again, every=len(saved.lse)
            )

    in_halves(q, run)
    return dq, dk, dv


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    *, saved: Saved, sizes: Sizes, scale: float, again: float, every: int,
) -> None:  # fmt: skip
    """Write dq, dk, dv. `every`: heads of the whole call, as in `_probe`."""
    batch, heads, tokens, dim = q.shape
    bh, m, top, s = batch * heads, sizes.m, sizes.top, sizes.s if sizes.top else 1
    block_d, routed, shared = power(dim, 16), bool(top), bool(sizes.shared)
    wide = q.dtype == torch.float32 or block_d > 64
    block_m = min(power(m, 16), 32 if wide else 64)
    blocks_m = ceil(m, block_m)
    block_n = 32 if wide else 64
    tile = min(block_n, attend_tile(tokens, m, s)) if routed else 32
    # enough programs to fill the device, each with a whole number of blocks
    share = block_n * max(1, min(16, every * tokens // (block_n * 1024)))
    splits = ceil(tokens, share)
    parts = _floats(q, 2, bh, splits, m, dim if shared else 0)
    delta = _floats(q, bh, tokens)
    sq, sk, sv, sg = (x.stride()[:3] for x in (q, k, v, grad))
    shared_backward_kernel[(bh * splits, blocks_m if shared else 1)](
        q, out, grad, saved.marks, saved.values, saved.lse, delta, parts[0], parts[1],
        *sq, *out.stride()[:3], *sg, heads, tokens, m, splits, share, again,
        D=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, SHARED=shared,
        num_warps=4, num_stages=1 if wide else 2,
    )  # fmt: skip
    dmarks, dread = parts.sum(2)
    dprobe = (dread * saved.values).sum(-1) if shared else dread

    tiles, listed = ceil(tokens, block_n), m * top
    members = saved.members.view(bh, listed)
    dkeys, dvalues = q.new_empty(2, *members.shape, dim)
    ordered = places = bounds = members
    if routed:
        block_k = min(32 if wide else 64, power(top, 16))
        expert_backward_kernel[(bh * m, ceil(top, block_k))](
            q, k, v, grad, saved.members, saved.starts, saved.order, saved.lse, delta,
            dkeys, dvalues, *sq, *sk, *sv, *sg, heads, tokens, m, scale,
            K=top, S=s, D=dim, BLOCK_D=block_d, BLOCK_K=block_k,
            T=tile, num_warps=4 if tile > 16 else 1, num_stages=1 if wide else 2,
        )  # fmt: skip
        ordered, places = members.sort(dim=1, stable=True)
        edges = torch.arange(0, (tiles + 1) * block_n, block_n, dtype=torch.int32, device=q.device)
        bounds = torch.searchsorted(ordered, edges.expand(bh, -1).contiguous())
    landmark_backward_kernel[(bh * splits,)](
        k, v, saved.exact, saved.probe_lse, dread, dprobe, ordered, places, bounds,
        dkeys, dvalues, dk, dv, parts[0], *sk, *sv, *dk.stride()[:3], *dv.stride()[:3],
        heads, tokens, m, splits, share, tiles, listed, scale,
        D=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCKS_M=blocks_m, BLOCK_N=block_n,
        BLOCK_C=128 if not wide and listed > 64 * tiles else 32,
        ROUTED=routed, SHARED=shared,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=1,
    )  # fmt: skip
    if shared:
        dmarks = dmarks + parts[0].sum(1)

    tiles = s * tokens // tile + m if routed else ceil(tokens, tile)
    into = dq.unsqueeze(0) if s == 1 else _floats(q, s, *q.shape)
    query_backward_kernel[(bh * tiles,)](
        q, k, v, grad, saved.marks, saved.values, saved.members, saved.starts, saved.order,
        saved.lse, delta, dmarks, into, *sq, *sk, *sv, *sg, *into.stride()[1:4], into.stride(0),
        heads, tokens, tiles, sizes.first, sizes.height, sizes.width, sizes.a, sizes.b,
        scale, again, M=m, K=top, S=s, D=dim, BLOCK_D=block_d, T=tile, BLOCK_E=power(m),
        BLOCK_C=min(32 if wide else 64, power(m * sizes.shared + top, 16)),
        ROUTED=routed, SHARED=shared, num_warps=4 if tile > 16 else 2,
        num_stages=1 if wide else 2, maxnreg=None if wide or tile < 64 else 128,
    )  # fmt: skip
    if s > 1:
        dq.copy_(into.sum(0))
