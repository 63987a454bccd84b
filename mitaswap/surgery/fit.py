"""Which mechanism goes to which site, and whether it can work there: all that can be known of a
swap before a network is touched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mitaswap.errors import MitaswapError, SwapError
from mitaswap.mechanisms import MECHANISMS, Mechanism, SiteShape, mechanism
from mitaswap.spec import Recipe, Spec
from mitaswap.surgery.sites import Site
from mitaswap.tokens import TokenLayout

logger = logging.getLogger(__name__)


def assign(model: nn.Module, recipe: Recipe, sites: Sequence[Site]) -> list[tuple[Site, Spec]]:
    """The sites that a recipe changes, each with its mechanism.

    Raises:
        MitaswapError: a pattern matches no site, a site asked for by name cannot be swapped, or no
            site can.
    """
    if not any(site.swappable or site.gridless for site in sites):
        raise _no_site(model, sites)
    paths = [site.path for site in sites]
    assigned = recipe.assign(paths)
    # "*" means all that can be swapped; any other pattern asks for what it names
    by_name = Recipe(tuple(rule for rule in recipe.rules if rule[0] != "*")).assign(paths)
    chosen = []
    for site in sites:
        spec = assigned.get(site.path)
        if spec is None or not (site.swappable or site.path in by_name):
            continue
        if site.gridless and "grid" not in mechanism(spec).needs:
            site = site.as_one_row()
        elif not site.swappable:
            hint = _without_grid(site, spec) if site.gridless else ""
            raise SwapError(
                f"{site.path} cannot be swapped: {site.reason}.{hint} Leave it out of the layer "
                "pattern."
            )
        chosen.append((site, spec))
    if assigned and not chosen:
        left_out = next(site for site in sites if site.gridless and site.path in assigned)
        raise _no_site(model, sites, _without_grid(left_out, assigned[left_out.path]))
    return chosen


def _no_site(model: nn.Module, sites: Sequence[Site], hint: str = "") -> SwapError:
    reasons = (
        "; ".join(f"{s.path}: {s.reason}" for s in sites[:3]) or "it makes no attention call at all"
    )
    dot = "." if hint else ""
    return SwapError(
        f"{type(model).__name__} has no site that can be swapped ({reasons}){dot}{hint}"
    )


def _without_grid(site: Site, spec: Spec) -> str:
    """What can be done at a site whose grid is unknown."""
    part = mechanism(spec)
    if "grid" not in part.needs:
        return (
            f" {part.spec} needs no grid: ask for the layer by name, layers={site.path!r}. '*' "
            "leaves out layers whose tokens may be no image's."
        )
    able = [name for name in able_at(site) if "grid" not in mechanism(name).needs]
    one = len(able) == 1
    need = "needs none" if one else "need none"
    if site.bias != "none":
        need += f" and {'honours' if one else 'honour'} the {site.bias}"
    return (
        f" {part.spec} needs the patch grid, which is read from a feature map of the forward and "
        f"cannot be given. {', '.join(able)} {need}; {'it runs' if one else 'they run'} here where "
        f"the layer is asked for by name, layers={site.path!r}."
    )


def able_at(site: Site) -> list[str]:
    """Names of the mechanisms that can honour what a site's attention call brings."""
    names = MECHANISMS.names()
    return [n for n in names if site.bias == "none" or "bias" in MECHANISMS.get(n).supports]


def fit(
    spec: Spec,
    site: Site,
    built: TokenLayout | None = None,
    equal: dict[Any, Any] | None = None,
    weight: Tensor | None = None,
) -> Mechanism:
    """A mechanism settled at a site.

    Args:
        built: the layout that learned parts are created for where it is not the site's.
        equal: options and shapes of other sites by value, for those that are equal to be the same
            objects: what the layers have in common, a compiled model looks at only once.
        weight: one of the network's, if it stays on its device: kernels are asked for there.

    Raises:
        SwapError: it cannot honour what the site brings, or its options do not fit; names the site
            and the mechanism.
    """
    equal = {} if equal is None else equal
    try:
        part = mechanism(spec)
    except MitaswapError as error:
        if spec.name not in MECHANISMS:  # of no site's making
            raise
        raise SwapError(f"{site.path}: {error}") from None
    for inner in part.modules():
        if isinstance(inner, Mechanism):
            inner.options = equal.setdefault(inner.options, inner.options)
    if site.bias != "none" and "bias" not in part.supports:
        what = {"bias": "an additive attention bias", "mask": "an attention mask"}
        raise SwapError(
            f"{site.path} ({site.module}) uses {what[site.bias]}, which {part.spec} cannot honour; "
            "`mitaswap ls` shows which mechanisms can."
        )
    if "project" in part.needs and site.projections is None:
        raise without_projections(site, part)
    assert site.layout is not None
    shape = SiteShape(site.heads, site.head_dim, built or site.layout, site.value_dim, site.width)
    try:
        if weight is not None:
            part.check_kernel(shape, weight.device, weight.dtype)
        smaller = part.fitting(site.layout, site.head_dim)
        part.attach(equal.setdefault(shape, shape))
        part.fit(site.layout, site.head_dim)
    except MitaswapError as error:
        raise SwapError(f"{site.path}: {error}") from None
    if smaller:
        _nothing_saved(part.spec, site.layout, smaller.spec)
    return part


@functools.cache
def _nothing_saved(spec: Spec, layout: TokenLayout, smaller: Spec) -> None:
    """A word, once: defaults for long sequences can fit, and be softmax attention or cost more."""
    logger.warning(
        "%s fits %s, but saves little or nothing there; %s is of a size for it",
        spec, layout, smaller,
    )  # fmt: skip


def without_projections(site: Site, part: Mechanism) -> SwapError:
    """What can be done at a site whose key and value projections are not known."""
    step = "choose another mechanism"
    if part.unprojected:
        step = f"use {part.spec.with_options(**part.unprojected)}, which runs everywhere"
    return SwapError(
        f"{site.path}: {part.spec} needs the module's own key and value projections, to map what "
        f"it makes of the module's input, but no submodule of this {site.module} alone makes, row "
        "by row, the keys and the values that its attention call is handed (there may be norms, "
        "rotary positions, biases or dropout around the projections, or the forward calls F.linear "
        f"by hand); {step}, or leave this layer out with layers=..."
    )


def ask(
    model: nn.Module,
    recipe: Recipe,
    sites: Sequence[Site],
    built: Mapping[str, TokenLayout] | None = None,
    asked: set[Any] | None = None,
) -> list[tuple[Site, Spec]]:
    """As `assign`, with every mechanism tried at its site: what else could be refused halfway
    through a run is refused now.

    Args:
        built: as `swap`.
        asked: what was asked before and is not asked again; more is added to it.
    """
    asked = set() if asked is None else asked
    chosen = assign(model, recipe, sites)
    for site, spec in chosen:
        layout = (built or {}).get(site.path)
        # sites that a mechanism cannot tell apart
        question = spec, layout, replace(site, path="", grid_from="")
        if question not in asked:
            fit(spec, site, layout)
            asked.add(question)
    return chosen
