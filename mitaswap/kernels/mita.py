"""MiTA attention on the GPU: custom operators (with and without what a backward needs) and their
fake implementations, over the plan of launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mitaswap.kernels.mita_call import Saved, Sizes, readable
from mitaswap.kernels.mita_plan import attend_backward, attend_forward, empty_saved
from mitaswap.kernels.tiles import like

__all__ = ["Sizes", "mita_attention"]


@torch.library.custom_op("mitaswap::mita", mutates_args=())
def mita(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], scale: float, again: float) -> Tensor:
    """MiTA's output [B, H, N, D] alone, for inference.

    Args:
        q, k, v: [B, H, N, D], one dtype of float16, bfloat16, float32.
        sizes: the fields of `Sizes`.
        scale: factor of the landmark scores and of the routed logits.
        again: factor of the shared logits.
    """
    with torch.cuda.device_of(q):
        return attend_forward(q, k, v, Sizes(*sizes), scale, again, save=False)[0]


@mita.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], scale: float, again: float) -> Tensor:
    return like(readable(q))


@torch.library.custom_op("mitaswap::mita_training", mutates_args=())
def mita_training(
    q: Tensor, k: Tensor, v: Tensor, sizes: list[int], scale: float, again: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mita` with its `Saved` tensors, differentiable through the first output."""
    with torch.cuda.device_of(q):
        out, saved = attend_forward(q, k, v, Sizes(*sizes), scale, again, save=True)
    assert saved is not None
    return (out, *saved)


@mita_training.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], scale: float, again: float) -> Any:
    q = readable(q)
    return (like(q), *empty_saved(q, Sizes(*sizes)))


@torch.library.custom_op("mitaswap::mita_backward", mutates_args=())
def mita_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: list[Tensor],
    sizes: list[int], scale: float, again: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v from that of the output and what `mita_training` returned."""
    with torch.cuda.device_of(q):
        return attend_backward(grad, q, k, v, out, Saved(*saved), Sizes(*sizes), scale, again)


@mita_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: list[Tensor],
    sizes: list[int], scale: float, again: float,
) -> Any:  # fmt: skip
    return tuple(like(readable(x)) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.sizes, ctx.scale, ctx.again = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, out, *saved = ctx.saved_tensors
    grads = mita_backward(grad, q, k, v, out, saved, ctx.sizes, ctx.scale, ctx.again)
    return (*grads, None, None, None)


mita_training.register_autograd(_differentiate, setup_context=_keep)


def mita_attention(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, scale: float, again: float
) -> Tensor:
    """MiTA by kernels; arguments as `mita`. Differentiable where gradients are asked for."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return mita_training(q, k, v, list(sizes), scale, again)[0]
    return mita(q, k, v, list(sizes), scale, again)
