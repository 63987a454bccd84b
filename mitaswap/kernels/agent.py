"""Agent attention on the GPU: its operators, their fake implementations and the plan of launches.

Forward: pool, keys (split over the tokens, then gather), read. Backward, by recompute: a pass over
queries and output gradients that sums, one over keys and values, and another over the queries,
whose gradients wait for those of the agents. A pass is bound by the bytes of the tokens that it
reads and writes, so each reads them once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mitaswap.kernels.agent_passes import (
    gather_kernel,
    keys_backward_kernel,
    keys_kernel,
    pool_kernel,
    queries_backward_kernel,
    queries_gradient_kernel,
    read_kernel,
    settle_agents_kernel,
    settle_values_kernel,
)
from mitaswap.kernels.tiles import ceil, dense, eighths, like, power, shares, split


class Windows(NamedTuple):
    """The pooling of the agents, in the order in which the operators take it.

    Args:
        first: first token of the patch grid.
        height, width: rows and columns of the grid.
        a, b: windows down and across, as in adaptive pooling; n = a * b agents.
    """

    first: int
    height: int
    width: int
    a: int
    b: int


class Plan(NamedTuple):
    """Block sizes of a call.

    Args:
        block_d: head dimension, padded.
        block_m: agents per block.
        blocks: blocks of agents.
        forward, backward: tokens per tile.
        warps: of the backward's programs.
    """

    block_d: int
    block_m: int
    blocks: int
    forward: int
    backward: int
    warps: int


def plan(q: Tensor, agents: int) -> Plan:
    """Block sizes for queries q [B, H, N, D].

    In half precision either all products of a kernel have 64 rows or more, or none has: those go to
    other matrix instructions, and kernels that mixed the two kinds gave other results in every
    run (Triton 3.6, H100).
    """
    block_d = power(q.shape[3], 16)
    row = block_d * q.element_size()
    if q.element_size() == 4:  # float32 products run on plain units, from registers
        block_m = min(power(agents, 16), 64 if row <= 256 else 32 if row <= 512 else 16)
        tile = min(64, max(16, 4096 // row))
        return Plan(block_d, block_m, ceil(agents, block_m), 2 * tile, tile, 8)
    if row > 256:
        return Plan(block_d, 32, ceil(agents, 32), 32, 32, 8)
    block_m = 128 if row <= 128 and agents > 64 else 64
    forward, warps = (128, 4) if row <= 128 else (64, 8)
    return Plan(block_d, block_m, ceil(agents, block_m), forward, 64, warps)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], agents and what they read [BH, n, D], their log-sum-exps [BH, n]."""
    batch, heads, tokens, dim = q.shape
    bh, m = batch * heads, windows.a * windows.b
    out, marks, values = like(q), q.new_empty(bh, m, dim), q.new_empty(bh, m, dim)
    lse = q.new_empty(bh, m, dtype=torch.float32)
    if not bh:
        return out, marks, values, lse
    block_d, block_m, blocks, block_n, *_ = plan(q, m)
    warps = 4 if q.element_size() == 2 else 8

    band = ceil(windows.height, windows.a) * windows.width
    pools = max(1, min(ceil(396, bh * windows.a), band // 256, 16))
    block_b = min(64, power(windows.b, 16))
    sums = q.new_empty(bh, pools, m, dim, dtype=torch.float32)
    pool_kernel[(bh * windows.a * pools, ceil(windows.b, block_b))](
        q, sums, *eighths(q), heads, pools, *windows,
        D=dim, BLOCK_D=block_d, BLOCK_B=block_b, BLOCK_N=min(64, block_n),
        num_warps=4, num_stages=3,
    )  # fmt: skip

    parts, each = split(tokens, bh * blocks, block_n, 264)
    several = parts > 1
    part_v = q.new_empty(bh, parts, m, dim * several, dtype=torch.float32)
    part_top, part_sum = q.new_empty(2, bh, parts, m * several, dtype=torch.float32)
    keys_kernel[(bh * parts, blocks)](
        k, v, sums, marks, values, lse, part_v, part_top, part_sum,
        *eighths(k), *eighths(v), heads, tokens, m, pools, parts, each, scale,
        D=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=several,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    if several:
        block_p, block_r = shares(parts, m)
        gather_kernel[(bh, ceil(m, block_r))](
            part_v, part_top, part_sum, values, lse, m, parts,
            D=dim, BLOCK_D=block_d, BLOCK_P=block_p, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip

    tile = min(64, block_n)
    parts, each = split(tokens, bh, tile, 528)
    read_kernel[(bh * parts,)](
        q, marks, values, out, *eighths(q), *eighths(out), heads, tokens, m, parts, each, scale,
        D=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCKS=blocks, BLOCK_N=tile,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out, marks, values, lse


@torch.library.custom_op("mitaswap::agent", mutates_args=())
def agent(
    q: Tensor, k: Tensor, v: Tensor, windows: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Agent attention without biases, differentiable through its first output.

    Args:
        q, k, v: [B, H, N, D], one dtype of float16, bfloat16, float32.
        windows: the fields of `Windows`.
        scale: factor of all logits.

    Returns:
        The output [B, H, N, D]; for the backward the agents and what they read, [BH, n, D], and the
        log-sum-exps (base 2) of their logits, float32 [BH, n].
    """
    return _attend(dense(q), dense(k), dense(v), Windows(*windows), scale)


@agent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, windows: list[int], scale: float) -> Any:
    bh, m, dim = q.shape[0] * q.shape[1], windows[3] * windows[4], q.shape[3]
    lse = q.new_empty(bh, m, dtype=torch.float32)
    return like(dense(q)), q.new_empty(bh, m, dim), q.new_empty(bh, m, dim), lse


@torch.library.custom_op("mitaswap::agent_backward", mutates_args=())
def agent_backward(
    q: Tensor, k: Tensor, v: Tensor, marks: Tensor, values: Tensor, lse: Tensor, grad: Tensor,
    windows: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v from that of the output, `grad` [B, H, N, D], and what `agent` kept."""
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    w = Windows(*windows)
    batch, heads, tokens, dim = q.shape
    bh, m = batch * heads, w.a * w.b
    grads = like(q), like(k), like(v)
    if not bh:
        return grads
    block_d, block_m, blocks, _, block_n, warps = plan(q, m)
    sizes: dict[str, Any] = {"D": dim, "BLOCK_D": block_d}
    tiles = {**sizes, "BLOCK_M": block_m, "BLOCKS": blocks, "BLOCK_N": block_n}
    stages = 3 if block_d <= 64 else 2
    # weights of keys, 1 / N on average, and gradients of values, sums over N, meet in between
    bits = tokens.bit_length() // 2

    parts, each = split(tokens, bh * blocks, block_n, 264)
    part_v, part_m = q.new_empty(2, bh, parts, m, dim, dtype=torch.float32)
    queries_backward_kernel[(bh * parts, blocks)](
        q, grad, marks, values, part_v, part_m, *eighths(q), *eighths(grad),
        heads, tokens, m, parts, each, scale, **tiles,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    grad_values = torch.empty_like(values)
    delta = torch.empty_like(lse)
    block_p, block_r = shares(parts, m)
    settle_values_kernel[(bh, ceil(m, block_r))](
        part_v, values, grad_values, delta, m, parts, 0.5**bits, **sizes,
        BLOCK_P=block_p, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip

    parts_k, each = split(tokens, bh * blocks, block_n, 264)
    part_k = q.new_empty(bh, parts_k, m, dim, dtype=torch.float32)
    keys_backward_kernel[(bh * parts_k, blocks)](
        k, v, marks, grad_values, lse, delta, grads[1], grads[2], part_k,
        *eighths(k), *eighths(v), *eighths(grads[1]), *eighths(grads[2]),
        heads, tokens, m, parts_k, each, scale, bits, **tiles,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    grad_marks = torch.empty_like(marks)
    settle_agents_kernel[(bh, ceil(m, block_r))](
        part_m, part_k, grad_marks, m, parts, parts_k, w.height, w.width, w.a, w.b, **sizes,
        BLOCK_P=block_p, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip

    parts, each = split(tokens, bh, block_n, 528)
    queries_gradient_kernel[(bh * parts,)](
        q, grad, marks, values, grad_marks, grads[0], *eighths(q), *eighths(grad),
        *eighths(grads[0]), heads, tokens, m, parts, each, scale, *w, **tiles,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return grads


@agent_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, marks: Tensor, values: Tensor, lse: Tensor, grad: Tensor,
    windows: list[int], scale: float,
) -> Any:  # fmt: skip
    return like(dense(q)), like(dense(k)), like(dense(v))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.windows, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    if grad is None:
        return None, None, None, None, None
    return *agent_backward(*ctx.saved_tensors, grad, ctx.windows, ctx.scale), None, None


agent.register_autograd(_backward, setup_context=_setup)


def agent_attention(q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float) -> Tensor:
    """Agent attention by kernels, [B, H, N, D]; arguments as the operator's."""
    return agent(q, k, v, list(windows), scale)[0]
