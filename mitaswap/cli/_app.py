"""The app, how it ends, and what its verbs share: consoles and the text of an error."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

import mitaswap
from mitaswap.errors import MitaswapError

#: results go to standard output, progress and errors to standard error
out = Console()
err = Console(stderr=True)

_AGAIN = "give the same command again."


class Stopped(Exception):
    """Ctrl-C, after what there was to keep has been kept; says how to go on."""


class _Verbs(TyperGroup):
    # before typer's own answer to Ctrl-C: silent in some versions, exit code 1 or 130
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt:
            raise Stopped from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped from None


app = typer.Typer(
    name="mitaswap",
    cls=_Verbs,
    help="Swap the attention of pretrained vision transformers and measure what that does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        out.print(f"mitaswap {mitaswap.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Swap the attention of pretrained vision transformers and measure what that does."""


def load_verbs() -> None:
    """Import the verbs' files, each of which adds its command to the app."""
    package = importlib.import_module("mitaswap.cli")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"mitaswap.cli.{module.name}")


def main() -> None:
    """Run the command line; exit code 2 for bad input and after Ctrl-C."""
    # what the hub does not give is one error at the end; its retries need no lines of their own
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        load_verbs()  # takes long enough for a Ctrl-C
        app(prog_name="mitaswap")
    except MitaswapError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        err.print(Text(f"stopped: {str(stopped) or _AGAIN}"), soft_wrap=True)
        sys.exit(2)
