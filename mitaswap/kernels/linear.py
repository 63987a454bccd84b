"""Linear attention on the GPU: its operators, their fake implementations and the plan of launches.

Forward: the memory (split over the tokens, then settled), and the queries that read it. Backward:
a pass over queries and output gradients and one over keys and values. A pass is bound by the bytes
of the tokens that it reads and writes, so each reads them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mitaswap.kernels.linear_passes import (
    keys_backward_kernel,
    memory_kernel,
    queries_backward_kernel,
    read_kernel,
    settle_gradient_kernel,
    settle_memory_kernel,
)
from mitaswap.kernels.tiles import ceil, dense, eighths, like, power, shares, split


def plan(q: Tensor) -> tuple[int, int, int, int]:
    """Padded head dimension, value columns per block and their blocks, tokens per tile.

    In half precision all products of a kernel have 64 rows or more, for the reason that the plan of
    agent attention gives.
    """
    half = q.element_size() == 2
    block_d = power(q.shape[3], 64 if half else 16)
    row = block_d * q.element_size()
    # a block of the memory is held in registers: at most 128 x 128 numbers
    block_v = min(block_d, 128 if row <= 256 else 64 if row <= 512 else 32)
    block_n = 64 if half else min(64, max(16, 4096 // row))
    return block_d, block_v, ceil(q.shape[3], block_v), block_n


def _attend(
    q: Tensor, k: Tensor, v: Tensor, feature: str, factor: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], memory [BH, D, D] and its norms [BH, D]."""
    batch, heads, tokens, dim = q.shape
    bh = batch * heads
    out, memory = like(q), q.new_empty(bh, dim, dim)
    norms = q.new_empty(bh, dim, dtype=torch.float32)
    if not bh:
        return out, memory, norms
    block_d, block_v, blocks, block_n = plan(q)
    sizes: dict[str, Any] = {"D": dim, "BLOCK_D": block_d, "FEATURE": feature}
    row = block_d * q.element_size()
    warps, stages = 4 if row <= 128 else 8, 3 if row <= 256 else 2
    # the memory is a sum over N: it is held about N times smaller, as are its norms
    shrink = 1.0 / power(tokens)

    parts, each = split(tokens, bh * blocks, block_n, 264)
    several = parts > 1
    part_m = q.new_empty(bh, parts, dim, dim * several, dtype=torch.float32)
    part_z, part_top = q.new_empty(2, bh, parts, dim * several, dtype=torch.float32)
    memory_kernel[(bh * parts, blocks)](
        k, v, memory, norms, part_m, part_z, part_top, *eighths(k), *eighths(v),
        heads, tokens, parts, each, shrink, **sizes, BLOCK_V=block_v, BLOCK_N=block_n,
        SPLIT=several, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if several:
        block_p, block_r = shares(parts, dim)
        settle_memory_kernel[(bh, ceil(dim, block_r))](
            part_m, part_z, part_top, memory, norms, parts, shrink, **sizes,
            BLOCK_P=block_p, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip

    parts, each = split(tokens, bh * blocks, block_n, 1056)
    read_kernel[(bh * parts, blocks)](
        q, memory, norms, out, *eighths(q), *eighths(out),
        heads, tokens, parts, each, factor, eps * shrink, **sizes, BLOCK_V=block_v, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, memory, norms


@torch.library.custom_op("mitaswap::linear", mutates_args=())
def linear(
    q: Tensor, k: Tensor, v: Tensor, feature: str, factor: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention, differentiable through its first output.

    Args:
        q, k, v: [B, H, N, D], one dtype of float16, bfloat16, float32.
        feature: elu, relu, or softmax.
        factor: of the queries, before their feature map.
        eps: added to the normaliser; softmax has none.

    Returns:
        The output [B, H, N, D]; for the backward the memory [BH, D, D] in q's dtype and its norms,
        float32 [BH, D].
    """
    return _attend(dense(q), dense(k), dense(v), feature, factor, eps)


@linear.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, feature: str, factor: float, eps: float) -> Any:
    bh, dim = q.shape[0] * q.shape[1], q.shape[3]
    norms = q.new_empty(bh, dim, dtype=torch.float32)
    return like(dense(q)), q.new_empty(bh, dim, dim), norms


@torch.library.custom_op("mitaswap::linear_backward", mutates_args=())
def linear_backward(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, norms: Tensor, grad: Tensor,
    feature: str, factor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v from that of the output, `grad` [B, H, N, D], and what `linear` kept."""
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    batch, heads, tokens, dim = q.shape
    bh = batch * heads
    grads = like(q), like(k), like(v)
    if not bh:
        return grads
    block_d, block_v, blocks, block_n = plan(q)
    sizes: dict[str, Any] = {"D": dim, "BLOCK_D": block_d, "FEATURE": feature}
    blocked = {**sizes, "BLOCK_V": block_v, "BLOCKS": blocks, "BLOCK_N": block_n}
    row = block_d * q.element_size()
    warps, stages = 4 if row <= 128 else 8, 3 if row <= 128 else 2 if row <= 256 else 1
    bits = tokens.bit_length() // 2
    if feature == "softmax":  # weights of keys, 1 / N on average, meet sums over N in between
        shrink, enlarge = 0.5**bits, block_d
    else:
        shrink, enlarge = 1.0 / power(tokens), block_d * 2**bits

    parts, each = split(tokens, bh * blocks, block_n, 264)
    part_m = q.new_empty(bh, parts, dim, dim, dtype=torch.float32)
    part_z = q.new_empty(bh, parts, dim, dtype=torch.float32)
    queries_backward_kernel[(bh * parts, blocks)](
        q, grad, memory, norms, grads[0], part_m, part_z,
        *eighths(q), *eighths(grad), *eighths(grads[0]), heads, tokens, parts, each, factor,
        eps / power(tokens), **blocked,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    grad_memory, grad_norms = torch.empty_like(memory), torch.empty_like(norms)
    block_p, block_r = shares(parts, dim)
    settle_gradient_kernel[(bh, ceil(dim, block_r))](
        part_m, part_z, memory, grad_memory, grad_norms, parts, shrink, float(enlarge), **sizes,
        BLOCK_P=block_p, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip

    parts, each = split(tokens, bh, block_n, 1056)
    keys_backward_kernel[(bh * parts,)](
        k, v, norms, grad_memory, grad_norms, grads[1], grads[2],
        *eighths(k), *eighths(v), *eighths(grads[1]), *eighths(grads[2]),
        heads, tokens, parts, each, bits, 1.0 / enlarge, **blocked,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grads


@linear_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, norms: Tensor, grad: Tensor,
    feature: str, factor: float, eps: float,
) -> Any:  # fmt: skip
    return like(dense(q)), like(dense(k)), like(dense(v))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.feature, ctx.factor, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    rest = (None, None, None)
    if grad is None:
        return (None, None, None, *rest)
    return *linear_backward(*ctx.saved_tensors, grad, ctx.feature, ctx.factor, ctx.eps), *rest


linear.register_autograd(_backward, setup_context=_setup)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature: str, factor: float, eps: float
) -> Tensor:
    """Linear attention by kernels, [B, H, N, D]; arguments as the operator's."""
    return linear(q, k, v, feature, factor, eps)[0]
