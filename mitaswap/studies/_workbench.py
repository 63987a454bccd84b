"""What studies work on: the networks and images of one plan, opened once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import torch

from mitaswap.checkpoint import (
    built_layouts,
    fingerprint,
    restore_extras,
    saved_recipe,
    trained_with,
)
from mitaswap.errors import MitaswapError
from mitaswap.evaluation import Images, OnImages, measure, open_seeded, place
from mitaswap.mechanisms import Mechanism, mechanism
from mitaswap.models import Network
from mitaswap.results import Row
from mitaswap.spec import Recipe, Spec
from mitaswap.studies._base import Plan, What
from mitaswap.studies._cost import body_flops, cores_cost, cost_columns
from mitaswap.surgery import Handle, Site, ask, swap, swapped_sites, walk
from mitaswap.tokens import TokenLayout


class Workbench:
    """Networks and images of one plan, opened once; one network on the device at a time."""

    def __init__(self, plan: Plan, on_decode: Callable[[int, int], None] | None = None) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.images = Images(plan.settings, on_decode)
        self._networks: dict[str, Network] = {}
        self._sites: dict[str, list[Site]] = {}
        self._tried: set[tuple[str, tuple[str, ...]]] = set()
        self._asked: set[Any] = set()
        self._scores: dict[tuple[str, Recipe], Row] = {}
        self._stored: dict[tuple[Any, ...], Row] = {}
        self._bodies: dict[str, int] = {}
        self._placed: str | None = None
        for label in plan.models:
            self.images.check(self.network(label))

    def network(self, label: str) -> Network:
        """The network of a label as its library made it, on the CPU or the evaluation's device."""
        if label not in self._networks:
            name, options = self.plan.models[label], self.plan.model_options
            network = open_seeded(name, self.settings, swapped=False, **options)
            sites = walk(network.module, network.example(2))
            if not any(site.swappable for site in sites):
                # explains itself; better here than in the middle of a run
                swap(network.module, "standard", example=network.example(2), sites=sites)
            self._networks[label], self._sites[label] = network, sites
        return self._networks[label]

    def sites(self, label: str) -> list[str]:
        """Paths of all attention sites, in the order of the forward pass."""
        self.network(label)
        return [site.path for site in self._sites[label]]

    def layouts(self, label: str) -> list[TokenLayout]:
        """Token layouts of the sites that can be swapped, the smallest grid first."""
        self.network(label)
        found = {s.layout for s in self._sites[label] if s.swappable and s.layout is not None}
        return sorted(found, key=lambda layout: (min(layout.grid), layout.patches))

    def saved(self, label: str) -> What | None:
        """What the network was converted to, where that is not what it was trained with."""
        recipe = saved_recipe(self.network(label))
        if recipe is None:
            return None
        swappable = [site.path for site in self._sites[label] if site.swappable]
        specs = {mechanism(spec).spec for spec in recipe.assign(self.sites(label)).values()}
        everywhere = len(specs) == 1 and set(recipe.assign(self.sites(label))) == set(swappable)
        return specs.pop() if everywhere else recipe

    def own(self, label: str) -> What:
        """What the network was trained with: a mechanism, or a recipe where layers differ."""
        said = self.plan.trained.get(label) or trained_with(self.network(label))
        if ": " not in said:
            return mechanism(said).spec
        rules = (rule.rpartition(": ") for rule in said.split("; "))
        return Recipe(tuple((pattern, mechanism(spec).spec) for pattern, _, spec in rules))

    def trained_with(self, label: str) -> str:
        """The same in words."""
        return str(self.own(label))

    def contents(self) -> dict[str, Any]:
        """Fingerprints of the networks and of the images: rows of others never join a run's."""
        weights = {label: _fingerprint(self.network(label)) for label in self.plan.models}
        return {"weights": weights, "images": self.images.set.fingerprint()}

    def fits(self, label: str, what: What) -> bool:
        """Whether the options are possible at every site that they would go to."""
        try:
            self._ask(label, self._recipe(label, what))
        except MitaswapError:
            return False
        return True

    def _ask(self, label: str, recipe: Recipe) -> list[tuple[Site, Spec]]:
        network = self.network(label)
        built = self._built(label, recipe)
        return ask(network.module, recipe, self._sites[label], built, self._asked)

    def _built(self, label: str, recipe: Recipe) -> dict[str, TokenLayout]:
        """The layouts that saved learned parts were created for, where the recipe keeps them."""
        network = self.network(label)
        as_saved = _as_saved(network, self.sites(label), recipe)
        return {p: at for p, at in built_layouts(network).items() if p in as_saved}

    def check(self, label: str, what: What) -> None:
        """Raise `MitaswapError` if this cannot run in this model: before any work is done."""
        network, sites = self.network(label), self._sites[label]
        recipe = self._recipe(label, what)
        chosen = self._ask(label, recipe)
        # Whether calls arrive at a mechanism is seen in a forward of the swapped network. It is
        # the same for all options of a mechanism, so a sweep takes one.
        kind = (label, tuple(f"{site.path}: {spec.name}" for site, spec in chosen))
        if kind not in self._tried:
            built = self._built(label, recipe)
            example = network.example(2)
            swap(network.module, recipe, example=example, sites=sites, built=built).undo()
            self._tried.add(kind)

    def _cost(self, label: str, parts: Mapping[str, Mechanism]) -> Row:
        """`cost_columns`, without numbers where a mechanism does not tell its cost, or runs where
        no grid is known.
        """
        known = {site.path for site in self._sites[label] if site.swappable}
        cores = None
        if known.issuperset(parts):
            with suppress(NotImplementedError):
                cores = cores_cost(parts, self._sites[label])
        return cost_columns(self._bodies[label], cores, self.settings.torch_dtype)

    @contextmanager
    def swapped(self, label: str, what: What) -> Iterator[tuple[Network, Handle]]:
        """The network on the device with other attention, put back afterwards."""
        network = self.network(label)
        if self._placed not in (None, label):
            self.network(self._placed).module.cpu()
        place(network.module, self.settings)
        self._placed = label
        recipe, sites = self._recipe(label, what), self._sites[label]
        if label not in self._bodies:  # while the network is as its library made it
            self._bodies[label] = body_flops(network, sites)
        with torch.random.fork_rng(devices=[]):
            # learned parts that were not trained are drawn from the seed alone
            torch.manual_seed(self.settings.seed)
            as_saved = _as_saved(network, self.sites(label), recipe)
            built = self._built(label, recipe)
            handle = swap(
                network.module, recipe, example=network.example(2), sites=sites, built=built
            )
        with handle:
            restore_extras(network, as_saved)
            yield network, handle

    def measure(self, study: str, label: str, what: What, on_images: OnImages) -> Row:
        """One row: the network with `what` in its attention, measured once for all studies."""
        key = (label, self._recipe(label, what))
        with_what = self.common(study, label, what)
        stored = self._stored.get(_place(with_what))
        if key not in self._scores and stored is not None:
            self._scores[key] = {k: v for k, v in stored.items() if k not in with_what}
        if key not in self._scores:
            decoded = self.images.decoded(self.network(label))
            with self.swapped(label, what) as (network, _):
                parameters = sum(p.numel() for p in network.module.parameters())
                cost = self._cost(label, swapped_sites(network.module))
                scores = measure(network, decoded, self.settings, on_images)
            self._scores[key] = {
                "param_count": round(parameters / 1e6, 3),
                **cost,
                **scores,
            }
        else:
            on_images(len(self.images.set))
        return {**with_what, **self._scores[key]}

    def recall(self, rows: Iterable[Row]) -> None:
        """Rows of the same run: what one study measured before, another does not measure again."""
        for row in rows:
            if "top1" in row:
                own = {k: v for k, v in row.items() if not k.startswith(("cell", "axis_"))}
                self._stored[_place(row)] = own

    def common(self, study: str, label: str, what: What) -> Row:
        """The columns that every row of a cell carries."""
        network, settings = self.network(label), self.settings
        size = network.preprocess.size
        return {
            "study": study,
            "model": label,
            "model_name": network.name,
            "arch": network.arch,
            "trained_with": self.trained_with(label),
            **_columns(what, self.plan.layers),
            "data": self.images.set.name,
            "split": self.images.set.split,
            "img_size": size[1] if size[0] == size[1] else f"{size[0]}x{size[1]}",
            "crop_pct": network.preprocess.crop_pct,
            "interpolation": network.preprocess.interpolation,
            "batch_size": settings.batch_size,
            "device": str(settings.torch_device),
            "dtype": settings.dtype,
            "seed": settings.seed,
        }

    def _recipe(self, label: str, what: What) -> Recipe:
        """`what` in the plan's layers; all others keep the network's own mechanism."""
        if isinstance(what, Recipe):
            return what
        if self.plan.layers == "*":
            return Recipe.of(what)
        own = self.own(label)
        rest = own if isinstance(own, Recipe) else Recipe.of(own)
        return Recipe(((self.plan.layers, what), *rest.rules))


def _place(row: Row) -> tuple[Any, ...]:
    """Which network a row is of, and with what in which layers."""
    return row["model"], row["run_with"], row["layers"]


def _columns(what: What, layers: str) -> Row:
    """What was run, where, and its options as long as they are the same in all layers."""
    rules = what.rules if isinstance(what, Recipe) else ((layers, what),)
    parts = [mechanism(spec) for _, spec in rules]
    run_with = str(what if isinstance(what, Recipe) else parts[0].spec)
    where = "; ".join(pattern for pattern, _ in rules)
    if len({part.spec for part in parts}) > 1:
        return {"run_with": run_with, "mechanism": "several", "layers": where}
    part, card = parts[0], parts[0].card
    known = {"run_with": run_with, "mechanism": part.family, **part.settings, "layers": where}
    return {**known, **{f.name: getattr(card, f.name) for f in fields(card)}}


def _as_saved(network: Network, paths: list[str], recipe: Recipe) -> list[str]:
    """The sites that get what they were saved with, learned parts too."""
    known = saved_recipe(network)
    saved = known.assign(paths) if known else {}
    return [
        path
        for path, spec in recipe.assign(paths).items()
        if path in saved and mechanism(saved[path]).spec == mechanism(spec).spec
    ]


def _fingerprint(network: Network) -> str:
    """Of the weights and of all that decides what they do with an image."""
    about = f"{network.preprocess!r} {json.dumps(network.config, sort_keys=True)}"
    found = hashlib.blake2b(about.encode(), digest_size=8)
    found.update(fingerprint(network).encode())
    return found.hexdigest()
