"""What a whole network costs: the paper's FLOPs columns from an untouched body and formulas."""

from __future__ import annotations

import pytest
import torch
from networks import timm_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mitaswap
from mitaswap.mechanisms import Cost
from mitaswap.models import open_model
from mitaswap.studies._cost import body_flops, cores_cost, cost_columns
from mitaswap.surgery import swapped_sites, walk

#: GFLOPs in the paper's Tab. 2 and 3 (multiply-adds, one digit) of DeiT-T and DeiT-S at 224
PAPER = {
    "tiny": {
        "standard": 1.2,
        "linear(feature=relu,norm=rms)": 1.1,
        "mhla": 1.1,
        "focused+dwc(kernel=5)": 1.1,
        "agent(n=49)": 1.1,
        "agent(n=49,bias=true)": 1.2,
        "mita(m=25,k=25)": 1.1,
        "mita(m=25,k=25)+dwc": 1.1,
    },
    "small": {
        "standard": 4.6,
        "agent(n=49)": 4.4,
        "agent(n=49,bias=true)": 4.4,
        "agent(n=49,bias=true)+dwc": 4.4,
        "mita(m=25,k=25)": 4.4,
        "mita(m=25,k=25)+dwc": 4.4,
        "mita(m=25,k=25)+dwc+gate": 4.7,
        "sparsifiner": 4.5,
    },
}


@pytest.fixture(scope="module")
def bodies() -> dict[str, tuple[object, list[mitaswap.surgery.Site], int]]:
    found = {}
    for size in PAPER:
        network = open_model(f"timm:deit_{size}_patch16_224", pretrained=False)
        sites = walk(network.module, network.example(2))
        found[size] = (network, sites, body_flops(network, sites))
    return found


@pytest.mark.parametrize(
    ("size", "spec"), [(size, spec) for size, column in PAPER.items() for spec in column]
)
def test_the_papers_flops(size: str, spec: str, bodies: dict) -> None:
    _, sites, body = bodies[size]
    part = {site.path: mitaswap.mechanism(spec) for site in sites}
    gmacs = (body + cores_cost(part, sites).flops) / 2e9
    # one printed digit, cut off by some and rounded by others
    assert gmacs == pytest.approx(PAPER[size][spec], abs=0.1)


@pytest.mark.parametrize(
    "spec",
    [
        "standard",
        "mita(m=9,k=9)",
        "linear+dwc+gate",
        "nsa(block=2)",
        "reformer",
        "dat",
        "bra(n=16)",
    ],
)
def test_body_and_cores_are_what_a_counter_sees(spec: str) -> None:
    """Negative control of the bookkeeping: the swapped network, counted whole."""
    network = open_model(
        "timm:vit_tiny_patch16_224(img_size=128,depth=2,num_classes=3)", pretrained=False
    )
    x = network.example(1)
    sites = walk(network.module, network.example(2))
    body = body_flops(network, sites)
    with mitaswap.swap(network.module, spec), torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            network.module(x)
        cost = cores_cost(swapped_sites(network.module), sites)
    total = body + cost.flops + cost.padding
    assert total == pytest.approx(counted.get_total_flops(), rel=0.001)


def test_columns_of_the_cost() -> None:
    """What the formulas count, what is executed, and bytes of the run's own numbers."""
    cores = Cost(flops=4_000_000, moved=3_000_000, padding=2_000_000)
    assert cost_columns(10_000_000, cores, torch.bfloat16) == {
        "gmacs": 0.007,
        "attn_gmacs": 0.002,
        "gmacs_executed": 0.008,
        "attn_mbytes": 6.0,
    }
    assert cost_columns(0, cores, torch.float32)["attn_mbytes"] == 12.0
    unknown = cost_columns(0, None, torch.float32)
    assert list(unknown) == [*cost_columns(0, cores, torch.float32)]
    assert set(unknown.values()) == {None}


def test_sites_that_stay_are_softmax() -> None:
    model = timm_vit()
    sites = walk(model)
    whole = cores_cost({}, sites)
    assert whole == cores_cost({s.path: mitaswap.mechanism("standard") for s in sites}, sites)
    one = cores_cost({sites[0].path: mitaswap.mechanism("linear")}, sites)
    assert one.flops != whole.flops
