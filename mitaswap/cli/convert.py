"""`mitaswap convert`: write a model with another attention mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mitaswap.cli import _options as opt
from mitaswap.cli._app import app, out
from mitaswap.errors import MitaswapError


@app.command()
def convert(
    model: opt.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    to: Annotated[
        Optional[str], typer.Option(help="Mechanism, for instance 'mita(m=25,k=25)'.")
    ] = None,
    layers: opt.Layers = "*",
    recipe: Annotated[
        Optional[Path], typer.Option(help="YAML file that maps layer patterns to mechanisms.")
    ] = None,
    arch: opt.Arch = None,
    pretrained: opt.Pretrained = True,
    trust_remote_code: opt.RemoteCode = False,
) -> None:
    """Swap a model's attention and save it: weights unchanged, the recipe in its config.json.

    Example: `mitaswap convert embedded:standard --to "mita(m=9,k=9)" -o converted`
    """
    from mitaswap.checkpoint import check_same_weights, check_target, open_network, save
    from mitaswap.spec import Recipe
    from mitaswap.surgery import convert as convert_model
    from mitaswap.surgery import revert, swapped_sites

    if (to is None) == (recipe is None):
        raise MitaswapError("give either --to MECHANISM or --recipe FILE.yaml")
    if recipe is not None and layers != "*":
        raise MitaswapError("--layers goes with --to; a recipe has its own layer patterns")
    rules = Recipe.from_yaml(recipe) if recipe else Recipe.of(to or "", layers)
    check_target(output)  # before a download, say
    network = open_network(model, **opt.model_options(arch, pretrained, trust_remote_code))
    if swapped_sites(network.module):
        revert(network.module)
    check_same_weights(output, network)
    convert_model(network.module, rules, example=network.example(2))
    save(network, output)
    done = swapped_sites(network.module)
    one = len(rules.rules) == 1 and rules.rules[0][0] == "*"
    by_layer = f"to {rules}" if one else f"({rules})"
    for line in (
        f"{len(done)} sites swapped {by_layer}; written to {output}",
        f'mitaswap.load("{output}") gives the swapped model back.',
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
