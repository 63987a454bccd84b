"""Comparisons of speed: every mechanism passes its gate and is timed in turn, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from mitaswap.benchmark import (
    CoreShape,
    Effort,
    Failure,
    Rates,
    Setting,
    Swaps,
    Verdict,
    attempt,
    best_batch,
    cast,
    core_runs,
    finite,
    gate,
    in_turn,
    model_runs,
    place,
)
from mitaswap.mechanisms import Mechanism, SiteShape
from mitaswap.models import Network
from mitaswap.results import Row
from mitaswap.spec import Spec
from mitaswap.studies._speed import Measured, checked, described, measured, rate, roofline

#: the network as its library made it, in the place of a mechanism
UNTOUCHED = "untouched"

Compute = Callable[[Callable[[int], None]], list[Row]]


def time_cores(
    specs: Sequence[Spec],
    effort: Effort,
    setting: Setting,
    batch: int,
    site: SiteShape,
    about: Row,
    rates: Rates,
) -> Compute:
    """A cell: attention cores of one shape, the first spec as baseline."""

    def compute(on_images: Callable[[int], None]) -> list[Row]:
        torch.compiler.reset()
        shape, compiled = CoreShape(batch=batch, site=site, **vars(setting)), _compiled(about)
        captured = about["mode"] == "cuda-graph"
        parts: dict[str, Mechanism] = {}
        verdicts: dict[str, Verdict] = {}
        found: dict[str, Measured] = {}
        for spec in specs:
            made = attempt(partial(_gated, spec, shape, compiled), setting.device)
            if isinstance(made, Failure):
                found[str(spec)] = made
            else:
                parts[str(spec)], verdicts[str(spec)] = made
        runs = attempt(partial(core_runs, parts, shape, compiled, captured), setting.device)
        if isinstance(runs, Failure):  # no room for q, k, v themselves
            found |= dict.fromkeys(parts, runs)
        else:
            found |= in_turn(runs, setting.device, effort)
        on_images(len(specs))
        layout = site.layout
        rows = []
        for spec in specs:
            row: Row = {
                **described(spec),
                **about,
                "tokens": layout.tokens,
                "grid": f"{layout.grid[0]}x{layout.grid[1]}",
                "prefix": layout.prefix,
                "batch_size": batch,
                **checked(verdicts.get(str(spec))),
                **measured(str(spec), str(specs[0]), found, {}),
            }
            rows.append({**row, **roofline(spec, shape, rates, row)})
        return rows

    return compute


def _gated(spec: Spec, shape: CoreShape, compiled: bool) -> tuple[Mechanism, Verdict]:
    part = cast(spec, shape)
    return part, gate(part, shape, compiled)


def time_networks(
    specs: Sequence[Spec], effort: Effort, setting: Setting, batch: int, swaps: Swaps, about: Row
) -> Compute:
    """A cell: the network at one size, untouched as baseline and with each mechanism.

    Args:
        batch: images per call; 0 for each network's own best.
    """

    def compute(on_images: Callable[[int], None]) -> list[Row]:
        torch.compiler.reset()
        names: dict[str, Spec | None] = {UNTOUCHED: None, **{str(spec): spec for spec in specs}}
        networks: dict[str, Network] = {}
        batches: dict[str, int] = {}
        verdicts: dict[str, Verdict] = {}
        found: dict[str, Measured] = {}
        for name, spec in names.items():
            made = attempt(partial(_swapped, swaps, spec, setting, batch), setting.device)
            if isinstance(made, Failure):
                found[name] = made
                continue
            networks[name], verdict = made
            if verdict is not None:
                verdicts[name] = verdict
            chosen = batch or best_batch(networks[name], swaps.size, setting, _compiled(about))
            if isinstance(chosen, Failure):
                found[name] = chosen
                del networks[name]
            else:
                batches[name] = chosen
        found |= _rounds(networks, batches, swaps, setting, effort, about, halve=not batch)
        on_images(len(specs))
        rows = []
        height, width = swaps.size
        for name, spec in names.items():
            rows.append(
                {
                    **({"run_with": name, "mechanism": name} if spec is None else described(spec)),
                    **about,
                    "model": swaps.network.arch,
                    "model_name": swaps.network.name,
                    "img_size": height if height == width else f"{height}x{width}",
                    "pixels": height * width,
                    "tokens": max(site.tokens for site in swaps.sites),
                    "batch_size": batches.get(name, batch or None),
                    **checked(verdicts.get(name)),
                    **measured(name, UNTOUCHED, found, batches),
                    **rate(found[name], batches.get(name, 0), setting),
                }
            )
        return rows

    return compute


def _swapped(
    swaps: Swaps, spec: Spec | None, setting: Setting, batch: int
) -> tuple[Network, Verdict | None]:
    """A network with its attention checked, site by site, on the device."""
    worst: Verdict | None = None
    for shape in swaps.shapes(batch or 1, setting) if spec is not None else []:
        assert spec is not None
        verdict = gate(cast(spec, shape), shape)
        if worst is None or verdict.error / verdict.tolerance > worst.error / worst.tolerance:
            worst = verdict
    network = place(swaps.copy(spec), setting)
    if not finite(network, swaps.size, setting):
        raise FloatingPointError(f"the outputs are not finite in {setting.dtype}")
    return network, worst


def _rounds(
    networks: Mapping[str, Network],
    batches: dict[str, int],
    swaps: Swaps,
    setting: Setting,
    effort: Effort,
    about: Row,
    halve: bool,
) -> dict[str, Measured]:
    """Networks timed in turn. A best batch that was found with less memory in use is halved once
    if it does not fit beside the other networks.
    """
    for last in (not halve, True):
        make = partial(model_runs, networks, batches, swaps.size, setting, _compiled(about))
        runs = attempt(make, setting.device)
        if isinstance(runs, Failure):
            found: dict[str, Measured] = dict.fromkeys(networks, runs)
        else:
            found = in_turn(runs, setting.device, effort)
        full = [n for n, x in found.items() if isinstance(x, Failure) and x.status != "failed"]
        if last or not full:
            break
        for name in full:
            batches[name] = max(1, batches[name] // 2)
    return found


def _compiled(about: Row) -> bool:
    return about["mode"] == "compile"
