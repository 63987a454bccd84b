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
