"""Converted directories: upstream's own files, the recipe in their config.json, learned extras
beside the weights.

    model.safetensors     upstream's parameters under upstream's names
    config.json           upstream's configuration plus the key "mitaswap": recipe, trained_with,
                          version, and the layouts that learned parts were created for; the recipe
                          names every option, whatever the defaults of a later version are
    mitaswap.safetensors  learned parts of the mechanisms, where they have any
    README.md             model card

Plain timm or transformers load the untouched network from the same directory; `load` puts the
mechanisms back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mitaswap import __version__
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import mechanism, spelled_out
from mitaswap.models import Network, open_model, wrap
from mitaswap.spec import Recipe
from mitaswap.surgery import convert, recipe_of, swapped_sites, walk
from mitaswap.tokens import TokenLayout

KEY = "mitaswap"
EXTRAS = "mitaswap.safetensors"
#: what `mitaswap train` keeps beside the network: the state to go on from, and the log
TRAINING = ("last.pt", "log.csv")
#: attribute of a module that `load` gave: what its weights were trained with, for `save`
_TRAINED = "_mitaswap_trained_with"


def load(name: str | Path, **options: Any) -> nn.Module:
    """The network called `name`, with its mechanisms swapped in if it was saved with any.

    Args:
        name: any model name (`timm:...`, `hf:...`, `embedded:...`) or a directory that `save` or
            the CLI wrote.
        options: as `mitaswap.models.open_model` (arch, pretrained, trust_remote_code, img_size).

    Returns:
        timm's or transformers' own module, in eval mode on the CPU.
    """
    return open_network(str(name), **options).module


def open_network(name: str, *, swapped: bool = True, **options: Any) -> Network:
    """As `load`, with what is known about the network around it.

    Args:
        swapped: whether to put the saved recipe's mechanisms in.

    Raises:
        MitaswapError: as `open_model`; or the saved recipe does not fit the network.
    """
    network = open_model(name, **options)
    recipe = saved_recipe(network)
    if trained_with(network) != "standard":
        setattr(network.module, _TRAINED, trained_with(network))
    if recipe is not None and swapped:
        convert(network.module, recipe, example=network.example(2), built=built_layouts(network))
        if options.get("pretrained") is not False:
            restore_extras(network)
    return network


def saved_recipe(network: Network) -> Recipe | None:
    """The recipe in the network's config.json, or None for a network of upstream."""
    recipe = _entry(network).get("recipe")
    if not recipe:
        return None
    # without the options that are the defaults again, as a user would write it
    rules = Recipe.of(recipe).rules
    return Recipe(tuple((pattern, mechanism(spec).spec) for pattern, spec in rules))


def trained_with(network: Network) -> str:
    """What the weights were trained with: a mechanism's spec, or a recipe where layers differ;
    upstream's networks were with `standard`.
    """
    known = _entry(network).get("trained_with") or getattr(network.module, _TRAINED, None)
    return str(known or "standard")


def training_with(network: Network) -> str:
    """What `trained_with` will be after training the network as it is swapped now."""
    recipe = recipe_of(network.module)
    if recipe is None:
        return "standard"
    sites = walk(network.module, network.example(2))
    specs = {site.mechanism for site in sites if site.swappable}
    # one mechanism everywhere goes by its own name, anything else needs the layers
    return str(specs.pop() if len(specs) == 1 else recipe)


def built_layouts(network: Network) -> dict[str, TokenLayout]:
    """By site, the token layouts that the saved learned parts were created for; they are
    interpolated from there to other image sizes.
    """
    known = _entry(network).get("built") or {}
    try:
        return {
            path: TokenLayout(prefix, (height, width), suffix)
            for path, (prefix, height, width, suffix) in known.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise MitaswapError(
            f"{network.name}: the key 'built' of its config.json must map sites to [prefix, rows, "
            f"columns, suffix], not {known!r}"
        ) from None


def _built(module: nn.Module) -> dict[str, list[int]]:
    """The same of a swapped module, as JSON: only of mechanisms that were created for a layout."""
    return {
        path: [at.prefix, *at.grid, at.suffix]
        for path, part in swapped_sites(module).items()
        if part.site is not None and part.learns
        for at in [part.site.layout]
    }


def _entry(network: Network) -> Mapping[str, Any]:
    entry = network.config.get(KEY) or {}
    recipe = entry.get("recipe") if isinstance(entry, Mapping) else entry
    if recipe is not None and not isinstance(recipe, Mapping):
        raise MitaswapError(
            f"{network.name}: the key {KEY!r} of its config.json must hold a recipe that maps "
            f"layer patterns to mechanisms, not {recipe!r}. Write the directory again with "
            "`mitaswap convert`, or remove the key to open the network as upstream made it."
        )
    return entry


def restore_extras(network: Network, paths: Collection[str] | None = None) -> None:
    """Load the learned parts that were saved beside a swapped network's weights.

    Args:
        paths: only those of these sites; the others keep what they were created with.

    Raises:
        MitaswapError: they are missing or not those of the mechanisms that are swapped in.
    """
    sites = set(swapped_sites(network.module) if paths is None else paths)
    wanted = {key for key in _extras(network.module) if key.partition(".mitaswap.")[0] in sites}
    if not wanted:
        return
    path = network.directory / EXTRAS if network.directory else None
    if path is None or not path.exists():
        raise MitaswapError(
            f"{network.name}: {EXTRAS} with {len(wanted)} learned tensors is missing. Fetch it "
            "again, or convert the network anew."
        )
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MitaswapError(
            f"cannot read {str(path)!r}, the learned parts of the mechanisms: {error}. The file is "
            "truncated or broken; fetch it again."
        ) from None
    # those of layers that are not swapped now may stay behind
    here = {key for key in found if key.partition(".mitaswap.")[0] in sites}
    if here != wanted:
        odd = sorted(here ^ wanted)[:3]
        raise MitaswapError(f"{path} does not fit the swapped network: {', '.join(odd)} differ")
    try:
        network.module.load_state_dict({key: found[key] for key in here}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MitaswapError(f"{path} does not fit the swapped network: {reason}") from None


def save(
    model: nn.Module | Network,
    directory: str | Path,
    *,
    trained_by: str | None = None,
    into_existing: bool = False,
) -> Path:
    """Write a swapped (or untouched) network as a directory, whole or not at all.

    Args:
        model: a `Network`, or a bare module of timm or transformers.
        directory: where to: a new or empty one, or one that `save` wrote, whose files are replaced.
        trained_by: what the weights were trained with; by default what the network said when
            `load` or `open_network` opened it, or `standard`.
        into_existing: write beside whatever the directory holds, replacing files of the same names;
            for callers that know the directory to be theirs.

    Returns:
        The directory.

    Raises:
        MitaswapError: the module comes from neither library, the directory holds files of others
            or a training, or it cannot be written.
    """
    if not into_existing:
        check_target(directory)
    network = model if isinstance(model, Network) else wrap(model)
    recipe = recipe_of(network.module)
    extras = _extras(network.module)
    entry: dict[str, Any] = {
        "version": __version__,
        "trained_with": trained_by or trained_with(network),
        "recipe": recipe and {pattern: str(spelled_out(spec)) for pattern, spec in recipe.rules},
    }
    built = _built(network.module)
    if built:
        entry["built"] = built
    state = {k: v for k, v in network.module.state_dict().items() if k not in extras}
    shown = {**entry, "recipe": recipe and recipe.to_dict()}
    files = {"README.md": _card(network, shown).encode()}
    if extras:
        plain = {key: value.detach().cpu().contiguous() for key, value in extras.items()}
        files[EXTRAS] = to_safetensors(plain)
    written = network.save(directory, {KEY: entry}, state, files)
    if not extras:
        (written / EXTRAS).unlink(missing_ok=True)  # of an earlier network in the same directory
    return written


def check_target(directory: str | Path) -> None:
    """Raise `MitaswapError` unless `save` may write there: new, empty, or written by `save`."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise MitaswapError(f"cannot save to {str(directory)!r}: it is a file, give a directory")
    try:
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise MitaswapError(f"cannot save to {str(directory)!r}: {error}") from error
    training = [name for name in names if name in TRAINING]
    if training:
        raise MitaswapError(
            f"cannot save to {str(directory)!r}: it holds a training ({', '.join(training)}), "
            "whose network would be replaced. Give a new directory."
        )
    if names and not _is_ours(target):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise MitaswapError(
            f"cannot save to {str(directory)!r}: it holds files that mitaswap did not write "
            f"({shown}), and some might be replaced. Give a new directory, an empty one, or one "
            "that `mitaswap convert` wrote."
        )


def check_same_weights(directory: str | Path, network: Network) -> None:
    """Raise `MitaswapError` if `save` would replace other weights there than those of a network,
    which is not swapped: its own with other mechanisms are no loss.
    """
    if not (Path(directory) / "config.json").exists():
        return
    there = open_network(str(directory), swapped=False)
    old, new = there.module.state_dict(), network.module.state_dict()
    same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    trained = (Path(directory) / EXTRAS).exists() and trained_with(there) != "standard"
    if not same or trained:
        what = "learned parts of the mechanisms" if same else "weights of another network"
        raise MitaswapError(
            f"cannot save to {str(directory)!r}: it holds {what} ({there.arch}, trained with "
            f"{trained_with(there)}), which would be lost. Give a new directory, or delete that "
            "one first."
        )


def _is_ours(directory: Path) -> bool:
    try:
        return KEY in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def fingerprint(network: Network) -> str:
    """A short hash of a network's weights, with the learned extras that lie beside them."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in network.module.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    extras = network.directory / EXTRAS if network.directory else None
    if extras is not None and extras.exists():
        found.update(extras.read_bytes())
    return found.hexdigest()


def _extras(module: nn.Module) -> dict[str, Tensor]:
    """State of the mechanisms inside a swapped module, by full name."""
    return {
        f"{path}.mitaswap.{name}": value
        for path, part in swapped_sites(module).items()
        for name, value in part.state_dict().items()
    }


def _card(network: Network, entry: Mapping[str, Any]) -> str:
    templates = Environment(
        loader=PackageLoader("mitaswap", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("model_card.md").render(network=network, entry=entry)
