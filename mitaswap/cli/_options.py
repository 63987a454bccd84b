"""Command-line options that several verbs have."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from mitaswap.errors import MitaswapError
from mitaswap.spec import split_top_level

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME(option=value), hf:NAME_OR_DIR, hf-hub:ORG/NAME, embedded:NAME, "
        "a directory, or a weights file with --arch.",
    ),
]
Arch = Annotated[
    Optional[str],
    typer.Option(help="Architecture of a bare weights file, in any other form of MODEL."),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained/--no-pretrained", help="Load pretrained weights, or leave them random."
    ),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code that comes with the weights run.")
]
Layers = Annotated[
    str, typer.Option(help="Which sites: numbers, ranges and globs, for instance '0-5,blocks.9.*'.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes the GPU if there is one.")
]


def items(option: str, text: str | None) -> list[str]:
    """The items of a comma list, none where the option was not given.

    Raises:
        MitaswapError: it was given, but names nothing.
    """
    found = split_top_level(text or "")
    if text is not None and not found:
        raise MitaswapError(f"{option} {text!r} names nothing; leave it out, or give names")
    return found


def model_options(arch: str | None, pretrained: bool, remote_code: bool) -> dict[str, Any]:
    """The options of `open_model` from the command line's."""
    return {
        "arch": arch,
        "pretrained": None if pretrained else False,
        "trust_remote_code": remote_code,
    }
