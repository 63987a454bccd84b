"""DeepSeek sparse attention: a light indexer picks each query's keys, for all heads together
(DeepSeek-AI 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.chosen import attend_chosen, chunks, keep_top, own_choice
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.orthogonal import orthogonal
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least, in_range, seeds
from mitaswap.operators.rotary import axial_angles, turned
from mitaswap.operators.select import top_indices
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout

#: the fastest turn of rotary positions over the slowest, on grids (10000 in texts)
ROPE_BASE = 100.0

#: index heads of the paper's model, and the width of each
PAPER = (64, 128)


@dataclass(frozen=True)
class DsaOptions(Options):
    """Options of DeepSeek sparse attention.

    Args:
        k: keys per query; 2048 is the paper's, of a long context.
        index_heads: heads of the indexer; 0 is as many as the attention has.
        index_dim: width of one index head, 128 as in the paper's model.
        index_from: what the indexer reads: `qk`, the queries and keys of all heads, whose products
            it approximates from the start; or `x`, the module's input, as the paper writes it, with
            a random start. Queries and keys are linear maps of x, so with `qk` the indexer is the
            paper's, a linear map of x, that starts at the pretrained projections.
        norm: layer norm of the index keys, as in the released code.
        rope: rotary positions of the index queries and keys, as in the released code.
        seed: of the indexer's start.
    """

    k: int = 2048
    index_heads: int = 0
    index_dim: int = 128
    index_from: Literal["qk", "x"] = "qk"
    norm: bool = False
    rope: bool = False
    seed: int = 0


@MECHANISMS.register("dsa")
class Dsa(Mechanism):
    """Softmax attention of token t to the k keys s with the largest index scores, the same keys for
    all heads:

    I_ts = sum_j w_tj ReLU(q^I_tj . k^I_s), with q^I, w linear in z_t and k^I in z_s.

    z is x, or the concatenated heads of q (for q^I and w) and k (for k^I). Special tokens are
    ordinary queries and keys.

    The formula has no positions. With `rope`, as in the released code, the first 4 floor(d_I / 8)
    channels of index queries and keys (there 64 of 128) are turned by the token's place: there its
    order in a text; here its row in the grid turns one half of them and its column the other, with
    the angles of rotary vision transformers (Heo et al. 2024, arXiv 2403.13298). Special tokens
    stay. The Hadamard rotation that the released code applies before it quantises is orthogonal and
    the same on both sides, so it changes no score.

    The paper trains the indexer by a loss of its own, on inputs that are cut from the graph. Here
    they are cut too, and I gets the gradient that it would have as a term of the logits.

    Parameters, with C the width of z and j one of the H_I index heads:
        index_queries [H_I * d_I, C]: with `qk` P on the columns of j's attention heads (those that
            equal j modulo H_I, or modulo H if there are fewer), zero elsewhere, with P a random
            matrix with orthonormal rows (or columns, if d_I > C), scaled to keep products of
            vectors on average; normal with variance 1 / C with `x`.
        index_keys [d_I, C]: P. q^I . k^I then approximates q . k, and is equal to it for d_I >= C.
        head_weights [H_I, C]: 0. head_bias [H_I]: 1.
        norm_weight [d_I]: 1. norm_bias [d_I]: 0. Only with `norm`.
    """

    options_type = DsaOptions
    options: DsaOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="N",
        construction="light-weight skim",
        topology="N times one-to-one",
        source="DeepSeek-AI 2025, DeepSeek-V3.2, arXiv 2512.02556, Eq. 1-2",
        cost="N^2 d_I + N k d",
        untrained="usable",
    )
    limits = (("dsa(k={tokens})", "standard"),)
    paper = "dsa(index_from=x)"
    samples = (
        {"k": 13},
        {"k": 9, "index_heads": 2, "index_dim": 5, "norm": True},
        {"k": 11, "index_heads": 4, "index_from": "x"},
        {"k": 12, "index_dim": 16, "rope": True},
    )
    axes = (("K", "k"),)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "special-set", "every-pair"}
        if not self.options.rope:
            held |= {"pointwise", "mirror"}
        if self.options.index_from == "qk":
            held |= {"routed-softmax"} if self.options.rope else {"key-set", "routed-softmax"}
        return frozenset(held)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        o = self.options
        return frozenset({"x"} if o.index_from == "x" else ()) | ({"grid"} if o.rope else set())

    @property
    def routes(self) -> bool:
        return self.options.index_from == "qk"

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, tokens = self.options, layout.tokens
        if self.site is None:  # once it is settled, k follows the image
            in_range(self, "k", o.k, 1, tokens, f"tokens (tokens {layout})")
        seeds(self, o.seed)
        at_least(self, "index_heads", o.index_heads, 0)
        if o.rope:
            at_least(self, "index_dim", o.index_dim, 8, "as rope turns pairs of half of it")
        at_least(self, "index_dim", o.index_dim, 1)

    def check_site(self, site: SiteShape) -> None:
        super().check_site(site)
        o, (most_heads, most) = self.options, PAPER
        heads, width = max(site.heads, most_heads), max(self._width(site), most)
        of = f"heads, as many as attention has or {most_heads} as in the paper's model"
        in_range(self, "index_heads", o.index_heads, 0, heads, of)
        of = f"channels, as many as the indexer reads or {most} as in the paper's model"
        in_range(self, "index_dim", o.index_dim, 1, width, of)

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        fits = 2 * DsaOptions.k <= layout.tokens
        return {} if fits else {"k": (layout.tokens + 3) // 4}

    def build(self, site: SiteShape) -> None:
        o, heads = self.options, self._heads(site)
        generator = torch.Generator("cpu").manual_seed(o.seed)
        if o.index_from == "x":
            width = self._width(site)
            keys = orthogonal(o.index_dim, width, generator)
            shape = (heads * o.index_dim, width)
            queries = torch.randn(shape, generator=generator, device="cpu") * width**-0.5
        else:
            width = self._width(site)
            keys = orthogonal(o.index_dim, width, generator)
            owner = torch.arange(site.heads) - torch.arange(heads)[:, None]
            reads = (owner % min(heads, site.heads) == 0).repeat_interleave(site.head_dim, dim=1)
            queries = (keys * reads[:, None]).flatten(0, 1)
        self.index_queries = nn.Parameter(queries)
        self.index_keys = nn.Parameter(keys)
        self.head_weights = nn.Parameter(torch.zeros(heads, width))
        self.head_bias = nn.Parameter(torch.ones(heads))
        if o.norm:
            self.norm_weight = nn.Parameter(torch.ones(o.index_dim))
            self.norm_bias = nn.Parameter(torch.zeros(o.index_dim))

    def _heads(self, site: SiteShape) -> int:
        return self.options.index_heads or site.heads

    def _width(self, site: SiteShape) -> int:
        """Channels that the indexer reads."""
        return site.width if self.options.index_from == "x" else site.heads * site.head_dim

    def _k(self, layout: TokenLayout) -> int:
        return min(self.options.k, layout.tokens)

    def cost(self, site: SiteShape) -> Cost:
        o, n, heads = self.options, site.layout.tokens, self._heads(site)
        d, dv = site.head_dim, site.value_dim
        k = self._k(site.layout)
        core = self._cost(site, attend_flops(n, k, d, dv), padding=attend_flops(n, n - k, d, dv))
        width = self._width(site)
        columns = (heads + 1) * o.index_dim + heads
        index = product_flops(n, width, columns) + heads * product_flops(n, o.index_dim, n)
        return core + Cost(index, 2 * n * o.index_dim)

    def _index(
        self, q: Tensor, k: Tensor, x: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, H_I, N, d_I], their weights [B, H_I, N, 1], index keys [B, d_I, N]."""
        dtype, o = q.dtype, self.options
        if o.index_from == "x":
            assert x is not None
            asks = answers = x.detach().to(dtype)
        else:
            asks, answers = (y.transpose(1, 2).flatten(2).detach() for y in (q, k))
        keys = F.linear(answers, self.index_keys.to(dtype))
        if o.norm:
            gain, bias = self.norm_weight.to(dtype), self.norm_bias.to(dtype)
            keys = F.layer_norm(keys, (o.index_dim,), gain, bias, 1e-6)
        queries = F.linear(asks, self.index_queries.to(dtype)).unflatten(2, (-1, o.index_dim))
        weights = F.linear(asks, self.head_weights.to(dtype), self.head_bias.to(dtype))
        queries = queries.transpose(1, 2)
        if o.rope:
            angles = axial_angles(layout, o.index_dim // 8, q, ROPE_BASE)
            queries, keys = turned(queries, angles), turned(keys, angles)
        return queries, weights.transpose(1, 2)[..., None], keys.transpose(1, 2)

    @staticmethod
    def _scores(queries: Tensor, weights: Tensor, keys: Tensor, rows: slice) -> Tensor:
        """Index scores of some queries, for all heads alike: [B, 1, rows, N]."""
        asked = queries[:, :, rows]
        matches = (asked.flatten(1, 2) @ keys).unflatten(1, asked.shape[1:3]).relu()
        return (weights[:, :, rows] * matches).sum(dim=1, keepdim=True)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        index = self._index(q, k, extra.get("x"), layout)

        def choose(rows: slice, logits: Tensor) -> Tensor:
            return keep_top(logits, self._scores(*index, rows), self._k(layout))

        return attend_chosen(q, k, v, scale, choose)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if not self.routes:
            return None
        if self.site is None:
            return self._twin(q, layout).route(q, k, layout=layout, scale=scale)
        q, k = working(q, k)
        index = self._index(q, k, None, layout)
        scores = (self._scores(*index, rows) for rows in chunks(q.shape[2]))
        members = torch.cat([top_indices(x, self._k(layout)) for x in scores], dim=2)
        members = members.expand(-1, q.shape[1], -1, -1)
        return Routing(members, own_choice(members))
