"""What a call of MiTA's kernels is fixed by, and what its backward needs of the forward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """Whole numbers that fix a call, in the order in which the operators take them.

    Args:
        first: first token of the patch grid.
        height, width: rows and columns of the grid.
        a, b: windows of the landmark pooling; m = a * b.
        top: keys per routed expert; 0 without routed experts.
        s: routed experts per query.
        shared: 1 with the shared expert, else 0.
    """

    first: int
    height: int
    width: int
    a: int
    b: int
    top: int
    s: int
    shared: int

    @property
    def m(self) -> int:
        return self.a * self.b


class Saved(NamedTuple):
    """What a backward needs besides q, k, v and the output.

    Args:
        lse: base-2 log-sum-exp of each query's logits, float32 [B * H, N].
        marks, values: landmarks and V~, in q's dtype [B * H, m, D].
        exact: landmarks, float32 [B * H, m, D].
        probe_lse: log-sum-exp of each landmark's scores, float32 [B * H, m].
        members: keys of each expert, int32 [B * H, m, k].
        starts, order: queries sorted by expert, int32 [B * H, m + 1] and [B * H, s * N].
        route: each query's experts, best first, int32 [B * H, s, N].
    """

    lse: Tensor
    marks: Tensor
    values: Tensor
    exact: Tensor
    probe_lse: Tensor
    members: Tensor
    starts: Tensor
    order: Tensor
    route: Tensor


def readable(x: Tensor) -> Tensor:
    """x with a dense last axis: rows are read as they lie, elements are not."""
    return x if x.stride(3) == 1 else x.contiguous()
