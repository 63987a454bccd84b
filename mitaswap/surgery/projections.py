"""The key and value projections of an attention module: which of its submodules they are, as one
dry forward shows it, and how they map other rows than the module's input.

They are found by where they lie, not by value, as what stands behind them may do nothing yet (a
bias of zeros, an adapter before it is trained). What the attention call is handed must be columns,
heads first, of the very memory that one submodule returned for the module's own input and that
nobody has written to since. Where norms, rotary positions or biases stand behind the projections,
or the forward calls `F.linear` by hand, nothing is, and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """Columns of what a submodule makes of the module's input.

    Args:
        child: name of the submodule inside the attention module.
        first, width: the columns, heads beside each other.
    """

    child: str
    first: int
    width: int


@dataclass(frozen=True)
class Projections:
    """Where an attention module's keys and values come from; equal for equal layers."""

    heads: int
    key: Projection
    value: Projection


def find(outputs: Sequence[tuple[str, Tensor]], k: Tensor, v: Tensor) -> Projections | None:
    """The projections that k and v [B, H, N, D] came from.

    Args:
        outputs: what submodules made of the module's input, by name: [B, N, O], or [B, h, w, O].

    Returns:
        None where either is no submodule's plain output, or is that of several.
    """
    if k.ndim != 4 or v.ndim != 4:
        return None
    keys, values = ({place for name, y in outputs if (place := _place(name, y, x))} for x in (k, v))
    if len(keys) != 1 or len(values) != 1:
        return None
    return Projections(k.shape[1], keys.pop(), values.pop())


def _place(name: str, y: Tensor, x: Tensor) -> Projection | None:
    """Columns of y that x [B, H, N, D] is a view of."""
    batch, heads, tokens, dim = x.shape
    columns, width = y.shape[-1], heads * dim
    if y.shape[0] != batch or y.shape[1:-1].numel() != tokens or not y.is_contiguous():
        return None
    if y.dtype != x.dtype or y.untyped_storage()._cdata != x.untyped_storage()._cdata:
        return None
    wanted = (tokens * columns, dim, columns, 1)
    steps = zip(x.shape, x.stride(), wanted, strict=True)
    first = int(x.storage_offset() - y.storage_offset())
    if any(n > 1 and step != want for n, step, want in steps):
        return None
    return Projection(name, first, width) if 0 <= first <= columns - width else None


def makes_rows_alone(module: nn.Module, of: Projections, x: Tensor, k: Tensor) -> bool:
    """Whether the projections map one row as they mapped it among all: x is the module's input,
    k [B, H, N, D] what the attention call was handed. A submodule that mixes tokens does not.
    """
    if type(k) is not Tensor or k.is_meta:  # no numbers to compare
        return True
    try:
        row, _ = project(module, of, k.dtype, x.flatten(1, -2)[:, :1])
    except (RuntimeError, TypeError, ValueError):
        return False
    room = 32 * torch.finfo(k.dtype).eps
    return bool((row - k[:, :, :1]).abs().max() <= room * k.abs().max())


def project(
    module: nn.Module, of: Projections, dtype: torch.dtype, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, M, D] that the module's own projections make of rows x [B, M, C], in
    the dtype of x. `dtype` is that of the network's own queries.

    The submodules are called as they are: adapters and quantised layers do what they do, hooks run
    once more, and what is trained is the network's own weights. One that makes both is called once.
    """
    first = _output(module, of.key.child, dtype, x)
    second = first if of.value.child == of.key.child else _output(module, of.value.child, dtype, x)
    keys, values = (
        _heads(y[..., at.first : at.first + at.width], of.heads).to(x.dtype)
        for y, at in ((first, of.key), (second, of.value))
    )
    return keys, values


def _output(module: Any, child: str, dtype: torch.dtype, x: Tensor) -> Tensor:
    for name in child.split("."):
        module = getattr(module, name)
    # autocast makes queries of another dtype than the weights; packed weights are no parameters
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    made: Tensor = module(x.to(dtype if dtype in floats or not floats else floats[0]))
    return made


def _heads(y: Tensor, heads: int) -> Tensor:
    """[B, N, H D] as [B, H, N, D]."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)
