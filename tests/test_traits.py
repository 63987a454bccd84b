"""Each mechanism's traits are laws: those it declares hold, those it does not declare fail."""

from __future__ import annotations

import math

import pytest
import torch
from attention_laws import LAYOUT, accepted, attend, draw, each, featured, innermost, site_of
from torch import Tensor

from mitaswap import TokenLayout, mechanism
from mitaswap.mechanisms import TRAITS

SPECIAL = [TokenLayout(3, (7, 8), suffix=2), TokenLayout(3, (8, 8), suffix=2), LAYOUT]
ODD = [TokenLayout(2, (9, 10)), TokenLayout(2, (7, 9)), TokenLayout(0, (8, 8)), LAYOUT]


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float(((one - other).abs().max() / other.abs().max().clamp(min=1e-9)).detach())


def shuffled(layout: TokenLayout) -> Tensor:
    return torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(1))


def linear(spec: str) -> float:
    part = mechanism(spec)
    q, k, v = draw()
    _, _, u = draw(seed=7)
    whole = attend(part, q, k, 2.0 * v - 0.5 * u)
    return gap(2.0 * attend(part, q, k, v) - 0.5 * attend(part, q, k, u), whole)


def averages(spec: str) -> float:
    part = mechanism(spec)
    q, k, v = draw()
    if hasattr(
        innermost(part).options, "eps"
    ):  # up to that of the normaliser; no query without features
        q, k = featured(q, k)
        part = mechanism(part.spec.with_options(eps=0.0))
    constant = v[:, :, :1].expand_as(v)
    return gap(attend(part, q, k, constant), constant)


def convex(spec: str) -> float:
    worst = 0.0
    for layout in accepted(spec):
        q, k, v = draw(layout)
        out = attend(mechanism(spec), q, k, v, layout)
        low, high = (f(v, dim=2, keepdim=True) for f in (torch.amin, torch.amax))
        # also weights alone: one-hot values show each of them
        eye = torch.eye(layout.tokens, dtype=v.dtype).expand(2, 3, -1, -1)
        weights = attend(mechanism(spec), q, k, eye, layout)
        worst = max(
            worst, float((low - out).max()), float((out - high).max()), float(-weights.min())
        )
    return max(worst, averages(spec))


def heads(spec: str) -> float:
    part = mechanism(spec)
    q, k, v = draw()
    out = attend(part, q, k, v)
    turned = attend(part, *(x[:, [1, 2, 0]] for x in (q, k, v)))
    alone = attend(mechanism(spec), *(x[:, 2:] for x in (q, k, v)))
    return max(gap(turned, out[:, [1, 2, 0]]), gap(alone, out[:, 2:]))


def key_set(spec: str) -> float:
    gaps = []
    for layout in accepted(spec):
        q, k, v = draw(layout)
        part, turn = mechanism(spec), shuffled(layout)
        want = attend(part, q, k, v, layout)
        gaps.append(gap(attend(part, q, k[:, :, turn], v[:, :, turn], layout), want))
    return max(gaps)


def moved(spec: str, layout: TokenLayout, turn: Tensor) -> float:
    part, tensors = mechanism(spec), draw(layout)
    out = attend(part, *(x[:, :, turn] for x in tensors), layout)
    return gap(out, attend(part, *tensors, layout)[:, :, turn])


def pointwise(spec: str) -> float:
    return max(moved(spec, layout, shuffled(layout)) for layout in accepted(spec))


def special_set(spec: str) -> float:
    gaps = []
    for layout in accepted(spec, SPECIAL):
        turn = torch.arange(layout.tokens)
        special = [*range(layout.prefix), *range(layout.prefix + layout.patches, layout.tokens)]
        turn[special] = turn[special[::-1]]
        gaps.append(moved(spec, layout, turn))
    return max(gaps)


def mirror(spec: str) -> float:
    gaps = []
    for layout in accepted(spec, ODD):
        for axis in (0, 1):
            turn = torch.arange(layout.tokens)
            raster = turn[layout.patch_slice].view(layout.grid)
            turn[layout.patch_slice] = raster.flip(axis).flatten()
            gaps.append(moved(spec, layout, turn))
    return max(gaps)


def routed_softmax(spec: str) -> float:
    """Softmax over the keys that `route` names, each as often as it names it."""
    gaps = []
    for layout in accepted(spec):
        q, k, v = draw(layout)
        part, scale = mechanism(spec), q.shape[3] ** -0.5
        out = attend(part, q, k, v, layout)
        routing = part.route(q, k, layout=layout, scale=scale)
        if routing is None:
            return 1.0
        members, choice = routing.members + 1, routing.choice + 1  # slot 0 takes what is unused
        held = torch.zeros(*members.shape[:3], layout.tokens + 1, dtype=q.dtype)
        held = held.scatter_add(-1, members, torch.ones_like(members, dtype=q.dtype))[..., 1:]
        chosen = torch.zeros(*q.shape[:3], members.shape[2] + 1, dtype=q.dtype)
        chosen = chosen.scatter_add(-1, choice, torch.ones_like(choice, dtype=q.dtype))[..., 1:]
        weights = (chosen @ held) * (q @ k.mT * scale).exp()
        gaps.append(gap(out, weights @ v / weights.sum(-1, keepdim=True)))
    return max(gaps)


#: how far each law is from holding, as a relative error
LAWS = {
    "linear": linear,
    "averages": averages,
    "convex": convex,
    "heads": heads,
    "key-set": key_set,
    "pointwise": pointwise,
    "special-set": special_set,
    "mirror": mirror,
    "routed-softmax": routed_softmax,
}


@pytest.mark.parametrize("trait", LAWS)
@each
def test_declared_traits_hold_and_no_others(spec: str, trait: str) -> None:
    wrong = LAWS[trait](spec)
    if trait in mechanism(spec).traits:
        assert wrong <= 1e-10, f"declared: {TRAITS[trait]}"
    else:
        assert wrong > 1e-6, f"holds, but is not declared: {TRAITS[trait]}"


@each
def test_scale(spec: str) -> None:
    """Without the trait a normaliser undoes any scale, up to its eps."""
    part = mechanism(spec)
    q, k, v = draw(dim=7)
    plain = attend(part, q, k, v)
    assert torch.equal(plain, attend(part, q, k, v, scale=1 / math.sqrt(7)))
    change = gap(attend(part, q, k, v, scale=0.9), plain)
    assert (change > 1e-4) if "scaled" in part.traits else (change < 1e-5)


@each
def test_every_pair_is_what_is_paid_for(spec: str) -> None:
    part = mechanism(spec)
    site = site_of(part)
    pairs = site.heads * LAYOUT.tokens**2
    if "every-pair" in part.traits:
        assert part.cost(site).flops >= 2 * pairs


def test_laws_and_traits_are_the_same_names() -> None:
    assert LAWS.keys() | {"scaled", "every-pair"} == TRAITS.keys()
