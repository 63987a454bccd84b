"""What the transcriptions share: the case they are compared on, and a few plain loops.

A transcription is written from the paper, not from the mechanism: one batch element, one head and
one query at a time, in plain loops, with no code of mitaswap. Autograd through the loops gives the
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mitaswap import TokenLayout


@dataclass(frozen=True)
class Inputs:
    """What a formula is given.

    Args:
        q, k, v: [B, H, N, D].
        scale: factor of q k^T.
        layout: where prefix tokens, patches and suffix tokens are among the N.
        x: the attention module's input [B, N, C].
        params: the mechanism's learned parts by name, random.
        projections: the module's own, for mechanisms that call them: `key_weight` [C, H D],
            `key_bias` [H D], `value_weight`, `value_bias`; keys are rows times the weight plus the
            bias, head by head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layout: TokenLayout
    x: Tensor
    params: Mapping[str, Tensor] = field(default_factory=dict)
    projections: Mapping[str, Tensor] = field(default_factory=dict)


Formula = Callable[[Inputs], Tensor]
Head = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN = TokenLayout(1, (3, 5))
BARE = TokenLayout(0, (3, 5))
TAIL = TokenLayout(0, (4, 7), suffix=2)
DEEP = TokenLayout(5, (3, 5))
BOTH = TokenLayout(1, (4, 7), suffix=2)
EVEN = TokenLayout(1, (4, 6))


@dataclass(frozen=True)
class Case:
    """A mechanism, its transcription, and where they are compared.

    Args:
        spec: call string of the mechanism.
        formula: the transcription.
        layout: token layout of the inputs.
        dim: head dim.
        scale: factor of q k^T; None for 1 / sqrt(dim).
        inputs: `random`; `constant` (all queries and all keys equal, so every score ties); `crowd`
            (all queries point one way, those of the first window most).
        built: grid at which the learned parts are created, where it is another one than the
            layout's: they are interpolated.
        room: largest difference allowed, relative to the largest entry.
    """

    spec: str
    formula: Formula
    layout: TokenLayout = PLAIN
    dim: int = 8
    scale: float | None = None
    inputs: str = "random"
    built: TokenLayout | None = None
    room: float = 1e-10

    def __str__(self) -> str:
        scale = "" if self.scale is None else f" scale={self.scale}"
        built = "" if self.built is None else f" built at {self.built}"
        return f"{self.spec} on {self.layout} D={self.dim}{scale}{built} {self.inputs}".strip()


def read(query: Tensor, keys: Tensor, values: Tensor, factors: list[float]) -> Tensor:
    """One query's softmax over pairs [K, D], each pair with its own factor on the logit."""
    logits = (keys * query).sum(1) * torch.tensor(factors, dtype=query.dtype)
    weights = torch.exp(logits - logits.detach().max())
    return (weights[:, None] * values).sum(0) / weights.sum()


def windows(tokens: Tensor, first: int, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """Means over a x b adaptive windows of the h x w raster at token `first`: [a * b, D]."""
    (h, w), (a, b) = grid, pool
    means = []
    for i in range(a):
        for j in range(b):
            rows = range(math.floor(i * h / a), math.ceil((i + 1) * h / a))
            columns = range(math.floor(j * w / b), math.ceil((j + 1) * w / b))
            cells = [tokens[first + r * w + c] for r in rows for c in columns]
            means.append(torch.stack(cells).sum(0) / len(cells))
    return torch.stack(means)


def largest(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest scores; of equal ones the lowest index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def each_head(head: Head, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A transcription of one head, applied to every batch element and head of [B, H, N, D]."""
    batches = []
    for b in range(q.shape[0]):
        batches.append(torch.stack([head(q[b, h], k[b, h], v[b, h]) for h in range(q.shape[1])]))
    return torch.stack(batches)
