"""Groups of mechanisms by name: what `--run usable` means for one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import MECHANISMS, learned_numbers, mechanism
from mitaswap.spec import Spec
from mitaswap.studies._workbench import Workbench

logger = logging.getLogger(__name__)


#: name of a group -> whether a mechanism is in it: every one; those that approximate softmax
#: attention without training; those that learn nothing; and these two together
GROUPS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "usable": lambda name: MECHANISMS.get(name).card.untrained == "usable",
    "parameter-free": lambda name: not learned_numbers(mechanism(name)),
    "untrained": lambda name: GROUPS["usable"](name) or GROUPS["parameter-free"](name),
}


def fitted(bench: Workbench, label: str, name: str) -> Spec:
    """A mechanism nobody gave options for, with options that fit the model's sites."""
    options = [MECHANISMS.get(name).suggest(layout) for layout in bench.layouts(label)]
    # the one for the smallest grid: what fits there is tried on the others
    return mechanism(Spec(name, options[0] if options else {})).spec


def members(bench: Workbench, label: str, group: str) -> list[Spec]:
    """The mechanisms of a group that can run in a model, with options that fit it; what cannot is
    left out with a word.
    """
    found = []
    for name in MECHANISMS.names():
        if not GROUPS[group](name):
            continue
        spec = fitted(bench, label, name)
        try:
            bench.check(label, spec)
        except MitaswapError as error:
            logger.warning("%s: %s is left out: %s", label, spec, error)
        else:
            found.append(spec)
    return found


def expanded(bench: Workbench, label: str, asked: Sequence[Spec]) -> list[Spec]:
    """Specs as they were asked for, groups replaced by their members, each once."""
    specs: list[Spec] = []
    for spec in asked:
        group = spec.name in GROUPS and not spec.options and not spec.wrappers
        specs += members(bench, label, spec.name) if group else [mechanism(spec).spec]
    return list(dict.fromkeys(specs))
