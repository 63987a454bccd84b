"""What the tests of the mechanisms share: the declared samples, layouts for them, random inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import MECHANISMS, WRAPPERS, Mechanism, SiteShape, Wrapper


def wraps(spec: str) -> bool:
    """Whether a wrapper can be around this mechanism at all."""
    try:
        mechanism(spec)
    except MitaswapError:
        return False
    return True


#: what wrappers are tried around: compression, routing, and a mechanism that needs x itself
INNER = ["linear", "mita(m=9,k=8,variant=route-only)", "agent(n=6)+gate(per=head)"]
#: every option set that the mechanisms declare, as call strings, and every wrapper around a few
SPECS = [str(Spec(name, sample)) for name, cls in MECHANISMS.items() for sample in cls.samples]
SPECS += [
    f"{inner}+{Spec(name, sample)}"
    for name, wrapper in WRAPPERS.items()
    for sample in wrapper.samples
    for inner in INNER
    if f"+{name}" not in inner and wraps(f"{inner}+{Spec(name, sample)}")
]
#: those whose queries choose experts
ROUTED = [spec for spec in SPECS if mechanism(spec).routes]

LAYOUT = TokenLayout(1, (8, 7))
LAYOUTS = [LAYOUT, TokenLayout(0, (7, 9), suffix=2), TokenLayout(5, (9, 8))]

each = pytest.mark.parametrize("spec", SPECS)


def innermost(part: Mechanism) -> Mechanism:
    """The mechanism inside all wrappers."""
    return innermost(part.inner) if isinstance(part, Wrapper) else part


def accepts(spec: str, layout: TokenLayout, dim: int = 8) -> bool:
    """Whether the options fit a layout."""
    try:
        mechanism(spec).check(layout, dim)
    except MitaswapError:
        return False
    return True


def accepted(spec: str, layouts: Iterable[TokenLayout] = LAYOUTS) -> list[TokenLayout]:
    """The layouts that the options fit; one at least, or the sample is a bad one."""
    fitting = [layout for layout in layouts if accepts(spec, layout)]
    assert fitting, f"no layout of the laws fits {spec}"
    return fitting


def draw(
    layout: TokenLayout = LAYOUT,
    batch: int = 2,
    heads: int = 3,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [B, H, N, D]: the same numbers for the same seed, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, heads, layout.tokens, dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    return q, k, v


def attend(
    part: Mechanism, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout = LAYOUT, **more: Any
) -> Tensor:
    """Call a mechanism, with what it needs of a module besides q, k and v."""
    return part(q, k, v, layout=layout, **given_to(part, q, k, v), **more)


def given_to(part: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What a mechanism is handed besides q, k and v: as the module's input the queries of all
    heads. For one that needs the projections the input holds q, k and v of all heads side by side,
    and the projections are a product with a 0/1 matrix that takes k and v out of it again.
    """
    if "project" not in part.needs:
        return {"x": side_by_side(q)} if "x" in part.needs else {}
    heads, columns = q.shape[1], [side_by_side(t) for t in (q, k, v)]
    x, widths = torch.cat(columns, dim=2), [t.shape[2] for t in columns]
    chosen = torch.eye(sum(widths), dtype=x.dtype, device=x.device)[:, widths[0] :]

    def project(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (rows @ chosen.to(rows.dtype)).split(widths[1:], dim=2)
        keys, values = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (keys, values))
        return keys, values

    return {"x": x, "project": project}


def side_by_side(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H D]."""
    return x.transpose(1, 2).flatten(2)


def site_of(
    part: Mechanism, layout: TokenLayout = LAYOUT, heads: int = 3, dim: int = 8
) -> SiteShape:
    """The site that `attend` is, for q, k and v of these sizes."""
    width = 3 * heads * dim if "project" in part.needs else 0
    return SiteShape(heads, dim, layout, width=width)


def featured(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k such that every feature map (ReLU, both signs) leaves every query and key features,
    and every pair has some in common.
    """
    q, k = q.abs() + 0.5, k.abs() + 0.5
    k[..., 1] = -k[..., 1]
    return q, k


def same(got: Tensor, want: Tensor, room: float = 1e-11) -> None:
    """Assert equality up to rounding."""
    torch.testing.assert_close(got, want, rtol=room, atol=room)


def differ(one: Tensor, other: Tensor) -> bool:
    """Negative control: far more apart than `same` allows."""
    return bool((one - other).abs().max() > 1e-4)
