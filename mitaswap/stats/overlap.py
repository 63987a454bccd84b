"""Expert overlap (the paper's Fig. 5): do experts gather the keys at the places of the queries
routed to them?

For one expert it is the intersection over union of two sets of positions: the keys it holds, and
the queries that chose it. Near the chance level routing is not clustering; near one it is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mitaswap.mechanisms import Routing
from mitaswap.stats._base import STATISTICS, Statistic
from mitaswap.tokens import TokenLayout


@STATISTICS.register("overlap")
class Overlap(Statistic):
    """Mean, minimum and maximum over experts and images, per head, with the chance level of the
    very set sizes.
    """

    summary = "IoU of an expert's key positions with the positions of its queries (Fig. 5)"

    def __init__(self) -> None:
        self.images = 0
        self.shape = (0, 0, 0)
        self.sums: dict[str, Tensor] = {}

    def update(self, routing: Routing, layout: TokenLayout) -> None:
        members, choice = routing.members, routing.choice
        batch, heads, experts, width = members.shape
        tokens = layout.tokens
        holds = torch.zeros(batch, heads, experts, tokens, dtype=torch.bool, device=members.device)
        holds.scatter_(-1, members, True)
        asks = torch.zeros(batch, heads, tokens, experts, dtype=torch.bool, device=members.device)
        asks = asks.scatter_(-1, choice, True).transpose(-1, -2)
        common = (holds & asks).sum(-1).double()
        queries = asks.sum(-1)
        iou = common / (width + queries - common)
        table = chance_table(tokens, width).to(iou.device)
        found = {
            "value": iou.sum((0, 2)),
            "chance": table[queries].sum((0, 2)),
            "empty": (queries == 0).double().sum((0, 2)),
            "low": iou.amin((0, 2)),
            "high": iou.amax((0, 2)),
        }
        fold = {"low": torch.minimum, "high": torch.maximum}
        for name, value in found.items():
            known = self.sums.get(name)
            self.sums[name] = value if known is None else fold.get(name, torch.add)(known, value)
        self.images += batch
        self.shape = (experts, width, tokens)

    def rows(self) -> list[dict[str, float | int | str]]:
        experts, width, tokens = self.shape
        count = self.images * experts
        means = {name: (self.sums[name] / count).tolist() for name in ("value", "chance", "empty")}
        bounds = {name: self.sums[name].tolist() for name in ("low", "high")}
        return [
            {
                "head": head,
                **{name: values[head] for name, values in (means | bounds).items()},
                "experts": experts,
                "width": width,
                "tokens": tokens,
                "images": self.images,
            }
            for head in range(len(means["value"]))
        ]


@functools.lru_cache(maxsize=64)
def chance_table(tokens: int, width: int) -> Tensor:
    """Expected IoU of a random set of `width` positions with a set of n positions, for n = 0 ...
    tokens.

    The size of the intersection is hypergeometric; the expectation of i / (width + n - i) is taken
    exactly.

    Returns:
        float64 [tokens + 1].
    """
    n = torch.arange(tokens + 1, dtype=torch.float64).unsqueeze(1)
    i = torch.arange(width + 1, dtype=torch.float64).unsqueeze(0)
    possible = (i <= n) & (width - i <= tokens - n)

    def log_choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma((a - b).clamp(min=0) + 1)

    total = log_choose(torch.tensor(float(tokens)).double(), torch.tensor(float(width)).double())
    weight = log_choose(n, i) + log_choose(tokens - n, width - i) - total
    weight = torch.where(possible, weight.exp(), 0.0)
    iou = i / (width + n - i).clamp(min=1)
    return (weight * iou).sum(1)
