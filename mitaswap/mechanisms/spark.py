"""Spark attention: the first features of queries and keys predict which keys a query reads (You et
al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.chosen import chunks, own_choice
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.select import top_indices
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class SparkOptions(Options):
    """Options of Spark attention.

    Args:
        k: keys per query; 256 is the paper's, of a language model's context.
        r: leading features that predict; 0 is half of the head dim, as in the paper.
        select: `statistical` keeps scores above the Gaussian quantile of their row, so k of them if
            they are distributed normally; `exact` keeps the k largest.
        gate: `softplus` of the other features' scores multiplies the weights, as in the paper, and
            nothing normalises the product. `exp` instead of it makes one softmax of both scores:
            softmax attention to the predicted keys, which suits pretrained weights.
    """

    k: int = 256
    r: int = 0
    select: Literal["statistical", "exact"] = "statistical"
    gate: Literal["softplus", "exp"] = "softplus"


@MECHANISMS.register("spark")
class Spark(Mechanism):
    """o(q) = V [softmax(Top_k(K_1 q_1)) * softplus(K_2 q_2)], with q_1 the first r features of q
    and q_2 the others.

    Top_k sets scores below its threshold to minus infinity. The statistical threshold of a row of N
    scores is mean + std * Q(1 - k / N), with Q the quantile function of the normal distribution; it
    never exceeds the largest score, so that no row stays empty. Both scores carry the site's scale:
    together they are the logit. Special tokens are ordinary queries and keys.

    Costs count k keys per query, also where the threshold keeps more or fewer.
    """

    options_type = SparkOptions
    options: SparkOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="N",
        construction="light-weight skim",
        topology="N times one-to-one",
        source="You et al. 2025, arXiv 2506.06644, Sec. 2 and 3 (cited by section)",
        cost="N^2 r + N k d",
        untrained="needs finetuning",
    )
    limits = (
        ("spark(k={tokens},gate=exp,select=exact)", "standard"),
        ("spark(k=9,r={dim},gate=exp,select=exact)", "topk(k=9)"),
    )
    samples = (
        {"k": 2},
        {"k": 14, "gate": "exp"},
        {"k": 3, "r": 1, "select": "exact"},
        {"k": 9, "r": 1, "select": "exact", "gate": "exp"},
    )
    axes = (("K", "k"),)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "scaled", "heads", "key-set", "pointwise", "special-set", "mirror"}
        if self.options.gate == "exp":
            held |= {"averages", "convex", "routed-softmax"}
        return frozenset(held | {"every-pair"})

    @property
    def routes(self) -> bool:
        return True

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        k, r, tokens = self.options.k, self.options.r, layout.tokens
        if self.site is None:  # once it is settled, k follows the image
            in_range(self, "k", k, 1, tokens, f"tokens (tokens {layout})")
        in_range(self, "r", r, 0, head_dim, "features of a head (0 is half of them)")

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        fits = 2 * SparkOptions.k <= layout.tokens
        return {} if fits else {"k": (layout.tokens + 3) // 4}

    def cost(self, site: SiteShape) -> Cost:
        n, r = site.layout.tokens, self._width(site.head_dim)
        k = min(self.options.k, n)
        dims = site.head_dim - r + site.value_dim
        flops = product_flops(n, r, n) + product_flops(n, k, dims)
        # the reference makes whole rows of scores, and masks those that were not kept
        return self._cost(site, flops, padding=product_flops(n, n - k, dims))

    def _width(self, head_dim: int) -> int:
        return self.options.r or max(1, head_dim // 2)

    def _dropped(self, scores: Tensor) -> Tensor:
        """Which keys a query does not read, bool, from the predicted scores [B, H, rows, N]."""
        tokens, scores = scores.shape[-1], scores.detach()
        k = min(self.options.k, tokens)
        if k == tokens:
            return torch.zeros_like(scores, dtype=torch.bool)
        if self.options.select == "exact":
            dropped = torch.ones_like(scores, dtype=torch.bool)
            return dropped.scatter(-1, top_indices(scores, k), False)
        mean = scores.mean(dim=-1, keepdim=True)
        std = ((scores - mean).square().sum(dim=-1, keepdim=True) / (tokens - 1)).sqrt()
        quantile = torch.special.ndtri(scores.new_full((), 1 - k / tokens))
        threshold = mean + std * quantile
        return scores < torch.minimum(threshold, scores.amax(dim=-1, keepdim=True))

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype, r = q.dtype, self._width(q.shape[-1])
        q, k, v = working(q, k, v)
        q, keys = q * scale, k.transpose(-1, -2).contiguous()
        out = []
        for rows in chunks(q.shape[2]):
            scores = q[:, :, rows, :r] @ keys[:, :, :r]
            rest = q[:, :, rows, r:] @ keys[:, :, r:]
            dropped = self._dropped(scores)
            if self.options.gate == "exp":
                scores = scores + rest
            weights = scores.masked_fill(dropped, float("-inf")).softmax(dim=-1)
            if self.options.gate == "softplus":
                weights = weights * F.softplus(rest)
            out.append(weights @ v)
        return torch.cat(out, dim=2).to(dtype)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        r = self._width(q.shape[-1])
        q, k = working(q, k)
        keys = k[..., :r].transpose(-1, -2)
        scores = ((q[:, :, rows, :r] * scale) @ keys for rows in chunks(q.shape[2]))
        dropped = torch.cat([self._dropped(x) for x in scores], dim=2)
        # kept positions in ascending order, then -1
        tokens = dropped.shape[-1]
        place = torch.arange(tokens, device=q.device).expand(dropped.shape)
        members = place.masked_fill(dropped, tokens).sort(dim=-1).values
        if self.options.select == "exact":
            members = members[..., : self.options.k]
        members = members.masked_fill(members == tokens, -1)
        return Routing(members, own_choice(members))
