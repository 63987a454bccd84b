"""Swapping mechanisms in and out, whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from mitaswap.errors import SwapError
from mitaswap.mechanisms import Mechanism
from mitaswap.spec import Recipe, Spec
from mitaswap.surgery.attend import attend_by, observing, way_of
from mitaswap.surgery.fit import assign, fit, without_projections
from mitaswap.surgery.grid import GridTracker, Observer, untrack
from mitaswap.surgery.interface import has_interface, interface, shadow_config
from mitaswap.surgery.projections import makes_rows_alone
from mitaswap.surgery.seam import Seam, Swapped, install, uninstall
from mitaswap.surgery.sites import Site, walk
from mitaswap.surgery.tap import InputTap, first_tensor
from mitaswap.surgery.witness import dry_run, example_input
from mitaswap.tokens import TokenLayout


class Handle:
    """A swap that can be undone; a context manager that undoes itself.

    Args:
        model: the swapped network.
        sites: the sites that were swapped, each with its mechanism.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self.model = model
        self.sites = sites

    def undo(self) -> None:
        """Put the network back exactly as it was. A second call does nothing."""
        if any(True for _ in _swapped(self.model)):
            revert(self.model)

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call `observer(path, mechanism, q, k, layout, scale)` at every attention call inside the
        block.
        """
        seams = [module._mitaswap for _, module in _swapped(self.model)]
        trackers = {id(seam.tracker): seam.tracker for seam in seams}.values()
        if any(tracker.observer is not None for tracker in trackers):
            raise SwapError("this model is being observed already")
        for tracker in trackers:
            tracker.observer = observer
        try:
            with observing():
                yield
        finally:
            for tracker in trackers:
                tracker.observer = None

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *error: object) -> None:
        self.undo()


def swap(
    model: nn.Module,
    to: str | Spec | Recipe | Mapping[str, str | Spec],
    layers: str = "*",
    *,
    example: Tensor | Mapping[str, Any] | None = None,
    sites: Sequence[Site] | None = None,
    built: Mapping[str, TokenLayout] | None = None,
) -> Handle:
    """Put a mechanism into the attention sites of `model`, in place, until the handle is undone.

    `with mitaswap.swap(model, "mita(m=25,k=25)"): ...` swaps for the length of the block.

    Args:
        model: network to change.
        to: a spec for `layers`, a mapping of layer patterns to specs, or a recipe.
        layers: which sites, by number, range or path (`"0-5,blocks.9.*"`); the default takes all
            that can be swapped.
        example: an input batch for the dry forward that finds the sites; by default random images.
        sites: what `walk` returned for this model, to save that dry forward.
        built: by site, the token layouts that learned parts are created for where these are not the
            example's: a network trained at another image size has them from there.

    Raises:
        SwapError: no site can be swapped, a site asked for by name cannot be, a mechanism cannot
            honour what a site brings, a site is swapped already, or after the swap the attention
            call did not arrive at the mechanism. The model is then as it was.
    """
    recipe = Recipe.of(to, layers)
    if example is None:
        example = example_input(model)
    sites = list(sites) if sites is not None else walk(model, example)
    taken = [path for path, _ in _swapped(model)]
    if taken:
        raise SwapError(
            f"{taken[0]} is swapped already ({len(taken)} sites are); call mitaswap.revert(model) "
            "or handle.undo() first"
        )
    chosen = assign(model, recipe, sites)
    equal: dict[Any, Any] = {}
    weight = next(model.parameters(), None)
    parts = {
        site.path: fit(spec, site, (built or {}).get(site.path), equal, weight)
        for site, spec in chosen
    }
    try:
        _install(model, [site for site, _ in chosen], parts)
        _verify(model, example, list(parts))
    except BaseException:
        _restore(model)
        raise
    return Handle(model, [site for site, _ in chosen])


def convert(
    model: nn.Module,
    to: str | Spec | Recipe | Mapping[str, str | Spec],
    layers: str = "*",
    *,
    example: Tensor | Mapping[str, Any] | None = None,
    built: Mapping[str, TokenLayout] | None = None,
) -> nn.Module:
    """Swap for good and return `model`; arguments and errors as `swap`. `mitaswap.save` writes it,
    `revert` undoes it.
    """
    swap(model, to, layers, example=example, built=built)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo every swap in `model`, in place: class, config, hooks and added modules are as before.

    Raises:
        SwapError: nothing is swapped, or another library has changed a swapped module's class
            since.
    """
    swapped = list(_swapped(model))
    if not swapped:
        raise SwapError(f"nothing is swapped in this {type(model).__name__}")
    for path, module in swapped:
        if "_mitaswap_original" not in vars(type(module)):
            raise SwapError(
                f"{path} is a {type(module).__name__} now: another library (FSDP, ...) changed its "
                "class after the swap. "
                "Undo that first, then revert."
            )
    _restore(model)
    return model


def _restore(model: nn.Module) -> None:
    """Take out whatever was put in, also where an installation stopped half way."""
    for _, module in list(_swapped(model)):
        uninstall(module)
    for module in model.modules():
        untrack(module)


def swapped_sites(model: nn.Module) -> dict[str, Mechanism]:
    """Path to mechanism of every swapped site; empty for an untouched model."""
    return {path: module.mitaswap for path, module in _swapped(model)}


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that makes this swap again: one rule per distinct mechanism; None for an untouched
    model.
    """
    rules: dict[Spec, list[str]] = {}
    for path, part in swapped_sites(model).items():
        rules.setdefault(part.spec, []).append(path)
    return (
        Recipe(tuple((",".join(paths), spec) for spec, paths in rules.items())) if rules else None
    )


def _swapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Swapped))


def _install(model: nn.Module, sites: Sequence[Site], built: dict[str, Mechanism]) -> None:
    trackers: dict[Any, GridTracker] = {}
    shadows: dict[Any, Any] = {}
    modules = dict(model.named_modules())
    for site in sites:
        assert site.layout is not None
        key = site.grid_from, site.layout
        if key not in trackers:
            tracker = trackers[key] = GridTracker(site.layout, site.channels_last)
            watched = modules[site.grid_from]
            if site.grid_from == site.path:
                watched.register_forward_pre_hook(tracker.before, with_kwargs=True)
            else:
                watched.register_forward_hook(tracker.after)
    for site in sites:
        module: Any = modules[site.path]
        weight = next(chain(module.parameters(), model.parameters()))
        part = built[site.path].to(device=weight.device)
        if weight.is_floating_point():
            part = part.to(dtype=weight.dtype)
        way, shadow = way_of(part, site), None
        if has_interface(module):  # one shadow for each config and way, usually one in all
            own = module.config
            if (id(own), way) not in shadows:
                shadows[id(own), way] = shadow_config(own, interface(attend_by(way)))
            shadow = shadows[id(own), way]
        tap = InputTap(site.path, site.channels_last) if "x" in part.needs else None
        if tap is not None:
            module.register_forward_pre_hook(tap.before, with_kwargs=True)
        seam = Seam(site, trackers[site.grid_from, site.layout], tap)
        install(module, part.train(module.training), way, seam, shadow)


def _keep_input(
    into: dict[str, Tensor], path: str, module: nn.Module, args: Any, kwargs: Any
) -> None:
    into[path] = first_tensor(args, kwargs)


def _verify(model: nn.Module, example: Any, paths: list[str]) -> None:
    """Run the swapped model once: each site's attention call must arrive at its mechanism, exactly
    once, and projections that a mechanism calls must map single rows as they map all.
    """
    seen: list[str] = []
    modules: dict[str, Any] = dict(model.named_modules())
    inputs: dict[str, Tensor] = {}
    hooks = []
    for path in paths:
        if "project" in modules[path].mitaswap.needs:
            keep = functools.partial(_keep_input, inputs, path)
            hooks.append(modules[path].register_forward_pre_hook(keep, with_kwargs=True))

    def watch(path: str, part: Mechanism, q: Tensor, k: Tensor, *_: Any) -> None:
        seen.append(path)
        if path in inputs:
            site = modules[path]._mitaswap.site
            if not makes_rows_alone(modules[path], site.projections, inputs.pop(path), k):
                raise without_projections(site, part)

    try:
        with Handle(model, []).observe(watch):
            dry_run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [path for path in paths if seen.count(path) != 1]
    if missed:
        raise SwapError(
            f"{missed[0]}: {seen.count(missed[0])} attention calls arrived at the mechanism in one "
            "forward, expected 1; "
            "the module bypasses the seam, nothing was changed"
        )
