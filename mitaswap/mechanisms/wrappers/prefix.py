"""Full softmax attention for the special tokens' queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mitaswap.mechanisms._card import Cost, SiteShape
from mitaswap.mechanisms._wrapper import WRAPPERS, Wrapper
from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import attend
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.tokens import TokenLayout


@WRAPPERS.register("prefix")
class Prefix(Wrapper):
    """Class, distillation and register tokens (in front or behind) read all N keys by softmax
    attention, whatever the patches do: a classifier's own query costs next to nothing.

    It concerns them as queries only; as keys they are what the inner mechanism makes of them.

    Wrappers apply from left to right, each to what stands before it, and this one replaces what it
    finds: in mita+gate+prefix the gate is for patches only, in mita+prefix+gate for all tokens.
    """

    summary = "keeps the queries of prefix and suffix tokens at full softmax attention"

    @property
    def supports(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset()

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        kept = self.inner.traits - {"pointwise", "routed-softmax"}
        return kept | {"scaled"}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"grid"}

    @outside_autocast
    def around(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: TokenLayout,
        scale: float,
        **extra: Any,
    ) -> Tensor:
        if layout.patches == layout.tokens:
            return out
        first, last = layout.prefix, layout.prefix + layout.patches
        queries, keys, values = working(torch.cat([q[:, :, :first], q[:, :, last:]], 2), k, v)
        special = attend(queries, keys, values, scale)[0].to(out.dtype)
        return torch.cat(
            [special[:, :, :first], out[:, :, first:last], special[:, :, first:]], dim=2
        )

    def extra_cost(self, site: SiteShape) -> Cost:
        layout = site.layout
        special = layout.tokens - layout.patches
        flops = attend_flops(special, layout.tokens, site.head_dim, site.value_dim)
        return Cost(site.heads * flops, 0)
