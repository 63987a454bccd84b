"""The key and value projections of an attention module: which of its submodules they are, as one
dry forward shows it, and how they map other rows than the module's input.

They are found by value. What the attention call is handed must be, to the bit, columns of what one
submodule made of the module's own input, heads first. Where norms, rotary positions or biases stand
behind the projections, or the forward calls `F.linear` by hand, nothing is equal and nothing is
claimed.
"""

from __future__ import annotations

import math
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
        None where either is no submodule's plain output, or could be several columns of it (in a
        network whose weights are all zero).
    """
    if k.ndim != 4 or v.ndim != 4 or k.is_meta:
        return None
    step = k.shape[1] * math.gcd(k.shape[3], v.shape[3])
    keys, values = (
        {place for name, y in outputs for place in _places(name, y, x, step)} for x in (k, v)
    )
    if len(keys) != 1 or len(values) != 1:
        return None
    return Projections(k.shape[1], keys.pop(), values.pop())


def _places(name: str, y: Tensor, x: Tensor, step: int) -> list[Projection]:
    """Columns of y that x [B, H, N, D] is."""
    batch, heads, tokens, dim = x.shape
    y, width = y.flatten(1, -2), heads * dim
    if y.dtype != x.dtype or y.device != x.device or y.shape[:2] != (batch, tokens):
        return []
    firsts = range(0, y.shape[2] - width + 1, step)
    return [
        Projection(name, first, width)
        for first in firsts
        if torch.equal(_heads(y[..., first : first + width], heads), x)
    ]


def project(module: nn.Module, of: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, M, D] that the module's own projections make of rows x [B, M, C], in
    the dtype of x.

    The submodules are called as they are: adapters and quantised layers do what they do, and what
    is trained is the network's own weights. One that makes both is called once.
    """
    first = _output(module, of.key.child, x)
    second = first if of.value.child == of.key.child else _output(module, of.value.child, x)
    keys, values = (
        _heads(y[..., at.first : at.first + at.width], of.heads).to(x.dtype)
        for y, at in ((first, of.key), (second, of.value))
    )
    return keys, values


def _output(module: Any, child: str, x: Tensor) -> Tensor:
    for name in child.split("."):
        module = getattr(module, name)
    # quantised layers may have no parameter that says what they take
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    made: Tensor = module(x.to(floats[0]) if floats else x)
    return made


def _heads(y: Tensor, heads: int) -> Tensor:
    """[B, N, H D] as [B, H, N, D]."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)
