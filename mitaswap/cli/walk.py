"""`mitaswap walk`: the attention sites of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.text import Text

from mitaswap.cli import _options as opt
from mitaswap.cli._app import app, out
from mitaswap.cli._tables import show

if TYPE_CHECKING:
    from mitaswap.surgery import Site


@app.command()
def walk(
    model: opt.Model,
    img_size: Annotated[
        Optional[tuple[int, int]], typer.Option(metavar="H W", help="Image size in pixels.")
    ] = None,
    arch: opt.Arch = None,
    pretrained: opt.Pretrained = True,
    trust_remote_code: opt.RemoteCode = False,
) -> None:
    """Show a model's attention sites: path, heads, head dim, tokens, bias, and whether they can be
    swapped.

    Example: `mitaswap walk timm:vit_tiny_patch16_224 --no-pretrained`
    """
    from mitaswap.checkpoint import open_network
    from mitaswap.surgery import walk as walk_model

    options = opt.model_options(arch, pretrained, trust_remote_code)
    network = open_network(model, **options, img_size=img_size)
    sites = walk_model(network.module, network.inputs(network.example(2, img_size)))
    show(
        f"{model}: {len(sites)} attention sites",
        {
            "#": "number", "path": "text", "heads": "number", "dim": "number",
            "tokens = prefix + h x w": "text", "bias": "words", "swap": "words",
        },
        [_line(number, site) for number, site in enumerate(sites)],
    )  # fmt: skip
    for reason in dict.fromkeys(site.reason for site in sites if site.reason):
        which = [str(number) for number, site in enumerate(sites) if site.reason == reason]
        out.print(Text(f"not {', '.join(which)}: {reason}", "yellow"), soft_wrap=True)
    if any(site.gridless and site.bias == "none" and not site.mechanism for site in sites):
        out.print(
            "Where only the grid is unknown, mechanisms that need none (`mitaswap ls`) run if the "
            "layer is asked for by name, --layers PATH.",
            markup=False,
        )
    if any(site.swappable and site.bias != "none" and not site.mechanism for site in sites):
        out.print(
            "Where a bias or mask is added to the scores, only mechanisms that honour it run."
        )
    usable = sum(site.swappable for site in sites)
    out.print(f"{usable} of {len(sites)} sites can be swapped.")


def _line(number: int, site: Site) -> list[object]:
    from mitaswap.surgery.fit import able_at

    state = Text("yes", "green") if site.swappable else Text("no", "yellow")
    if site.swappable and site.bias != "none":
        state = Text(f"{', '.join(able_at(site))} only", "yellow")
    if site.mechanism:
        state = Text(site.mechanism, "cyan")
    tokens = f"{site.tokens} = {site.layout}" if site.layout else site.tokens or None
    return [number, site.path, site.heads or None, site.head_dim or None, tokens, site.bias, state]
