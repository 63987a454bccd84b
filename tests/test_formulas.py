"""Every mechanism against a slow transcription of its formula, outputs and gradients, in fp64.

The transcriptions are the files of `formulas`, one for each mechanism. Learned parts are random
here, and compared too.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import formulas
import pytest
import torch
import torch.nn.functional as F
from formulas._case import Case, Inputs
from torch import Tensor

from mitaswap import mechanism
from mitaswap.mechanisms import MECHANISMS, WRAPPERS, SiteShape

FILES = {
    found.name: import_module(f"formulas.{found.name}")
    for found in pkgutil.iter_modules(formulas.__path__)
    if not found.name.startswith("_")
}
CASES: list[Case] = [case for file in FILES.values() for case in file.CASES]
NEAR_MISSES: dict[str, Case] = {
    f"{name}: {miss}": case
    for name, file in FILES.items()
    for miss, case in file.NEAR_MISSES.items()
}


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a case, leaves that require gradients."""
    torch.manual_seed(len(str(case)))
    shape = (2, 3, case.layout.tokens, case.dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    if case.inputs == "constant":  # dyadic numbers: their sums are exact in any order
        q, k = torch.full_like(q, 0.5), torch.full_like(k, 0.5)
    elif case.inputs == "crowd":
        strength = torch.full(shape[2:3], 0.1, dtype=torch.float64)
        strength[case.layout.prefix] = 3.0
        q = q[:, :, :1] * strength[:, None]
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def value_and_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of one fixed random functional of it."""
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    grads = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True)
    return [out.detach()] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def projections(case: Case, width: int) -> dict[str, Tensor]:
    """Random projections of the module, as `Inputs` has them."""
    columns = 3 * case.dim
    shapes = {"weight": (width, columns), "bias": (columns,)}
    return {
        f"{part}_{name}": torch.randn(shape, dtype=torch.float64).requires_grad_()
        for part in ("key", "value")
        for name, shape in shapes.items()
    }


def both(case: Case) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names, then output and gradients of the mechanism, and of the transcription."""
    q, k, v = draw(case)
    x = torch.randn(q.shape[0], q.shape[2], 3 * case.dim, dtype=torch.float64).requires_grad_()
    scale = case.dim**-0.5 if case.scale is None else case.scale
    part = mechanism(case.spec)
    part.attach(SiteShape(3, case.dim, case.built or case.layout, width=x.shape[2]))
    part.double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    params = dict(part.named_parameters())
    own = projections(case, x.shape[2]) if "project" in part.needs else {}

    def project(rows: Tensor) -> list[Tensor]:
        made = (F.linear(rows, own[f"{y}_weight"].T, own[f"{y}_bias"]) for y in ("key", "value"))
        return [y.unflatten(2, (3, case.dim)).transpose(1, 2) for y in made]

    extra = {name: y for name, y in (("x", x), ("project", project)) if name in part.needs}
    got = part(q, k, v, layout=case.layout, scale=scale, **extra)
    want = case.formula(Inputs(q, k, v, scale, case.layout, x, params, own))
    leaves = [q, k, v, x, *params.values(), *own.values()]
    names = ["output", "dq", "dk", "dv", "dx", *(f"d{name}" for name in (*params, *own))]
    return names, value_and_gradients(got, leaves), value_and_gradients(want, leaves)


def test_every_mechanism_has_a_transcription() -> None:
    assert {*MECHANISMS.names(), *WRAPPERS.names()} == FILES.keys()
    for name, file in FILES.items():
        assert file.NEAR_MISSES, name
        for case in file.CASES:
            spec = mechanism(case.spec).spec
            assert name in (spec.name, *(wrapper.name for wrapper in spec.wrappers)), case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mechanism_is_its_formula(case: Case) -> None:
    names, made, wanted = both(case)
    # a gradient that is zero by the formula, of a key's bias, is the rounding of terms that cancel
    rounding = 4 * torch.finfo(torch.float64).eps * max(float(y.abs().max()) for y in wanted)
    for name, got, want in zip(names, made, wanted, strict=True):
        # relative to the largest entry: entries near zero are sums that cancel
        room = max(case.room * max(float(want.abs().max()), 1e-3), rounding)
        assert (got - want).abs().max() <= room, name


@pytest.mark.parametrize("case", [c for c in CASES if c.inputs == "crowd"], ids=str)
def test_crowd_leaves_experts_empty(case: Case) -> None:
    """The premise of the crowd cases: every query's first choice is expert 0."""
    q, k, _ = draw(case)
    routing = mechanism(case.spec).route(q, k, layout=case.layout, scale=0.3)
    assert routing is not None
    assert (routing.choice[..., 0] == 0).all()


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_comparison_tells_near_misses_apart(miss: str) -> None:
    """Negative control: the tolerance above is far below the effect of any one detail."""
    _, got, want = both(NEAR_MISSES[miss])
    assert (got[0] - want[0]).abs().max() > 1e-6
