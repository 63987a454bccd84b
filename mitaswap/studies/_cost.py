"""What a swapped network costs per image: the body, counted once, and the attention cores by their
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mitaswap.mechanisms import Cost, Mechanism, SiteShape, mechanism
from mitaswap.models import Network
from mitaswap.results import Row
from mitaswap.surgery import Site


def shape_of(site: Site) -> SiteShape:
    """What a mechanism may know of a site that can be swapped."""
    assert site.layout is not None
    return SiteShape(site.heads, site.head_dim, site.layout, site.value_dim, site.width)


def body_flops(network: Network, sites: Sequence[Site]) -> int:
    """FLOPs of one image through an untouched network, without the attention cores of those sites
    that can be swapped.
    """
    counter = FlopCounterMode(display=False)
    # by plain products: not every version of the counter knows every fused attention kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network.forward(network.example(1))
    softmax = mechanism("standard")
    cores = sum(softmax.cost(shape_of(site)).flops for site in sites if site.swappable)
    return int(counter.get_total_flops()) - cores


def cores_cost(parts: Mapping[str, Mechanism], sites: Sequence[Site]) -> Cost:
    """The attention cores of all sites that can be swapped; those without a mechanism of their own
    are softmax attention.

    Raises:
        NotImplementedError: a mechanism (of another package) that does not tell its cost.
    """
    total, softmax = Cost(0, 0), mechanism("standard")
    for site in sites:
        if site.swappable:
            total = total + parts.get(site.path, softmax).cost(shape_of(site))
    return total


def cost_columns(body: int, cores: Cost | None, dtype: torch.dtype) -> Row:
    """What one image costs, as columns of a row; nothing is known without the cores' cost.

    `gmacs` and `attn_gmacs` are 10^9 multiply-adds, as timm and most papers count, of the whole
    network and of the attention cores, by the formulas. `gmacs_executed` has what the PyTorch
    reference spends besides, on empty slots and masked pairs: a counter of operations sees this
    number. `attn_mbytes` are 10^6 bytes that the cores must move in numbers of `dtype`.
    """
    if cores is None:
        return dict.fromkeys(("gmacs", "attn_gmacs", "gmacs_executed", "attn_mbytes"))
    whole, itemsize = body + cores.flops, torch.finfo(dtype).bits // 8
    return {
        "gmacs": _short(whole / 2e9),
        "attn_gmacs": _short(cores.flops / 2e9),
        "gmacs_executed": _short((whole + cores.padding) / 2e9),
        "attn_mbytes": _short(cores.bytes(itemsize) / 1e6),
    }


def _short(number: float) -> float:
    return float(f"{number:.6g}")
