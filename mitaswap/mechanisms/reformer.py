"""Reformer's attention: queries meet the keys that a locality-sensitive hash puts into the same
bucket (Kitaev et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.blocks import expert_blocks, owner_blocks
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, merge, take
from mitaswap.operators.masked import attend_masked, fallback
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range, seeds
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class ReformerOptions(Options):
    """Options of Reformer's attention.

    Args:
        buckets: hash buckets, an even number; 0 takes the paper's, two buckets for each chunk of
            the site's N tokens (2 N / chunk).
        chunk: keys per chunk.
        rounds: hash rounds, whose keys are united.
        share_qk: the paper's shared-QK attention: queries are the mean of q and k, keys are those
            queries at unit length, and a token attends to itself only where it has nothing else.
            `false` serves pretrained weights: it keeps q and k apart, as they were trained.
        look: `back` is a query's own chunk and the one before (the paper); `both` also the one
            after.
        across: take all keys of those chunks, whatever their bucket, as the released code can. The
            paper takes those of the query's own bucket.
        seed: of the random rotations.
    """

    buckets: int = 0
    chunk: int = 32
    rounds: int = 4
    share_qk: bool = True
    look: Literal["back", "both"] = "back"
    across: bool = False
    seed: int = 0


@MECHANISMS.register("reformer")
class Reformer(Mechanism):
    """Softmax over the keys that any of several hash rounds brings within reach of the query.

    In each round the bucket of x is h(x) = argmax([x R; -x R]), with a random matrix R that all
    heads share. Keys are sorted by bucket, then position, and cut into chunks. A query stands where
    a key of its bucket at its position would stand, and reaches the keys of its bucket in its own
    chunk and the previous one. Rounds merge by log-sum-exp, keys that n rounds bring counting 1 / n
    in each, so that the result is one softmax over the union. A query without any key gets its own
    value.

    The paper has shared-QK attention only, where queries and keys sort alike. A trained network
    hands over q and k; one projection for both is their mean, a linear map like theirs. The place
    of a query among separate keys (`share_qk=false`) is ours. Chunks do not wrap around.
    Rotations stay the same in training. Special tokens are tokens like others.
    """

    options_type = ReformerOptions
    options: ReformerOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="buckets x rounds",
        construction="hashing",
        topology="N-to-rounds",
        source="Kitaev et al. 2020, arXiv 2001.04451, Eq. 4-6 and App. A",
        cost="N rounds chunk d",
        untrained="needs finetuning",
    )
    limits = (("reformer(chunk={tokens},across=true,share_qk=false,rounds=1)", "standard"),)
    samples = (
        {"chunk": 8, "rounds": 2},
        {"chunk": 8, "rounds": 2, "share_qk": False},
        {"chunk": 6, "rounds": 3, "buckets": 4, "look": "both", "seed": 1, "share_qk": False},
        {"chunk": 5, "rounds": 1, "across": True, "share_qk": False},
    )
    axes = (("N", "buckets"), ("K", "chunk"))
    rotations: Tensor

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "heads"}
        return frozenset(held if self.options.share_qk else held | {"routed-softmax"})

    @property
    def routes(self) -> bool:
        return True

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        in_range(self, "chunk", o.chunk, 1, layout.tokens, f"tokens (tokens {layout})")
        built = self._built(layout)
        of = f"buckets, two for each token (tokens {built})"
        in_range(self, "buckets", o.buckets, 0, 2 * built.tokens, of)
        if o.buckets % 2:
            raise MitaswapError(
                f"{self.spec}: buckets={o.buckets} must be even (each rotation gives two), or 0 "
                f"for 2 N / chunk; use buckets={o.buckets + 1}"
            )
        in_range(self, "rounds", o.rounds, 1, 64, "rounds that are allowed")
        seeds(self, o.seed)

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        return {} if layout.tokens >= 64 else {"chunk": layout.tokens // 4}

    def build(self, site: SiteShape) -> None:
        o, tokens = self.options, site.layout.tokens
        # the even number nearest to 2 N / chunk
        buckets = o.buckets or max(2, 2 * ((2 * tokens + o.chunk) // (2 * o.chunk)))
        generator = torch.Generator().manual_seed(o.seed)
        rotations = torch.randn(o.rounds, site.head_dim, buckets // 2, generator=generator)
        self.register_buffer("rotations", rotations, persistent=False)

    def cost(self, site: SiteShape) -> Cost:
        o, n, d, dv = self.options, site.layout.tokens, site.head_dim, site.value_dim
        own = self
        if self.site is None:
            own = Reformer(o)
            own.attach(site)
        hashes = product_flops(n, d, own.rotations.shape[2]) * (1 if o.share_qk else 2)
        blocks, block = expert_blocks(n, -(-n // o.chunk))
        flops = o.rounds * (hashes + attend_flops(n, self._reach, d, dv))
        padding = o.rounds * attend_flops(blocks * block - n, self._reach, d, dv)
        return self._cost(site, flops, padding=padding)

    @property
    def _reach(self) -> int:
        """Keys in the chunks that a query looks at."""
        return self.options.chunk * (3 if self.options.look == "both" else 2)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        rounds = self._rounds(q, k)
        if self.options.share_qk:
            q = (q + k) / 2
            k = F.normalize(q, dim=-1)
        branches = [self._attend(q, k, v, scale, i, rounds) for i in range(len(rounds))]
        return merge([*branches, fallback(v)])

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, number: int, rounds: list[_Round]
    ) -> Branch:
        """One round's branch; keys that n rounds bring have log n taken off their logits."""
        here = rounds[number]
        chunks, inside = here.chunks(self.options.chunk, self._reach)
        blocks = owner_blocks(here.query_chunk, chunks.shape[2])
        held = take(chunks, blocks.owner)  # keys of each block [B, H, blocks, reach]
        source = blocks.source.unflatten(2, (held.shape[2], -1))
        meets = [self._meets(each, source, held) for each in rounds]
        count = torch.zeros_like(meets[0], dtype=q.dtype)
        for each in meets:
            count = count + each
        inside = inside[blocks.owner].unsqueeze(-2)
        queries = take(q, blocks.source).unflatten(2, source.shape[2:])
        keys, values = (take(x, held.flatten(2)).unflatten(2, held.shape[2:]) for x in (k, v))
        allowed = meets[number] & inside
        out, lse = attend_masked(queries, keys, values, allowed, scale, -count.log())
        return take(out.flatten(2, 3), blocks.back), take(lse.flatten(2, 3), blocks.back)

    def _rounds(self, q: Tensor, k: Tensor) -> list[_Round]:
        """Where queries and keys stand in every round."""
        q, k = q.detach(), k.detach()
        found = []
        for rotation in self.rotations.to(q.dtype):
            if self.options.share_qk:
                query_bucket = key_bucket = _hash((q + k) / 2, rotation)
            else:
                query_bucket, key_bucket = _hash(q, rotation), _hash(k, rotation)
            found.append(_sort(query_bucket, key_bucket, self.options.chunk))
        return found

    def _meets(self, at: _Round, queries: Tensor, keys: Tensor) -> Tensor:
        """Which of the pairs queries [B, H, M, R], keys [B, H, M, K] one round brings within reach:
        bool [B, H, M, R, K].
        """

        def pairs(of_query: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor]:
            left = of_query.gather(-1, queries.flatten(2)).view(queries.shape)
            right = of_key.gather(-1, keys.flatten(2)).view(keys.shape)
            return left.unsqueeze(-1), right.unsqueeze(-2)

        mine, theirs = pairs(at.query_chunk, at.key_chunk)
        after = 1 if self.options.look == "both" else 0
        met = (theirs >= mine - 1) & (theirs <= mine + after)
        if not self.options.across:
            mine, theirs = pairs(at.query_bucket, at.key_bucket)
            met = met & (mine == theirs)
        if self.options.share_qk:
            met = met & (queries.unsqueeze(-1) != keys.unsqueeze(-2))
        return met

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if self.site is None:
            return self._twin(q, layout).route(q, k, layout=layout, scale=scale)
        q, k = working(q, k)
        rounds = self._rounds(q, k)
        itself = torch.arange(q.shape[2], device=q.device).expand(q.shape[:3]).unsqueeze(-1)
        found: list[Tensor] = []
        for number, here in enumerate(rounds):
            chunks, inside = here.chunks(self.options.chunk, self._reach)
            held = take(chunks, here.query_chunk)  # [B, H, N, reach]
            new = self._meets(here, itself, held).squeeze(-2) & inside[here.query_chunk]
            for before in rounds[:number]:
                new = new & ~self._meets(before, itself, held).squeeze(-2)
            found.append(torch.where(new, held, -1))
        members = torch.cat(found, dim=-1)
        alone = (members < 0).all(dim=-1, keepdim=True)
        members = torch.where(alone, torch.cat([itself, members[..., 1:]], dim=-1), members)
        return Routing(members, itself)


@dataclass(frozen=True)
class _Round:
    """Bucket and chunk of every query and key, and the keys in their order: int64 [B, H, N]."""

    query_bucket: Tensor
    key_bucket: Tensor
    query_chunk: Tensor
    key_chunk: Tensor
    order: Tensor

    def chunks(self, size: int, reach: int) -> tuple[Tensor, Tensor]:
        """Keys within reach of the queries of each chunk [B, H, chunks, reach], and which of these
        slots lie inside the list of keys [chunks, reach].
        """
        tokens = self.order.shape[2]
        start = torch.arange(-(-tokens // size), device=self.order.device) * size - size
        place = start[:, None] + torch.arange(reach, device=self.order.device)
        index = place.clamp(0, tokens - 1)
        return self.order[..., index], (place == index)


def _hash(x: Tensor, rotation: Tensor) -> Tensor:
    buckets = []
    for rows in x.split(512, dim=2):  # many tokens have many buckets
        turned = rows @ rotation
        buckets.append(torch.cat([turned, -turned], dim=-1).argmax(dim=-1))
    return torch.cat(buckets, dim=-1)


def _sort(query_bucket: Tensor, key_bucket: Tensor, size: int) -> _Round:
    """Keys in order of bucket, then position, and each query where such a key would be."""
    tokens = key_bucket.shape[2]
    position = torch.arange(tokens, device=key_bucket.device)
    ranked, order = (key_bucket * tokens + position).sort(dim=-1)
    place = torch.searchsorted(ranked, query_bucket * tokens + position).clamp(max=tokens - 1)
    key_place = torch.zeros_like(order).scatter(-1, order, position.expand_as(order))
    return _Round(query_bucket, key_bucket, place // size, key_place // size, order)
