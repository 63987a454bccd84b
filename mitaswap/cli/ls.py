"""`mitaswap ls`: what there is to choose from."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mitaswap.cli._app import app, out
from mitaswap.cli._tables import show
from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

if TYPE_CHECKING:
    from mitaswap.mechanisms import Mechanism


@app.command()
def ls(
    name: Annotated[
        Optional[str],
        typer.Argument(help="A mechanism or wrapper, to read all about it and its options."),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also sources, all options, and what is no mechanism and why."),
    ] = False,
) -> None:
    """List mechanisms, wrappers, embedded models, data sets, statistics, studies and figures.

    Example: `mitaswap ls mita`
    """
    from mitaswap.mechanisms import MECHANISMS, OUTSIDE, WRAPPERS, mechanism

    if name is not None:
        _one(name)
        return
    known = dict(MECHANISMS.items())
    show(
        "Mechanisms (the five dimensions of the MiTA paper's Tab. 1)",
        {
            "mechanism": "words", "strategy": "text", "expert type": "text",
            "count": "text", "construction": "text", "topology": "text",
        },
        [
            (n, c.strategy, c.expert_type, c.expert_count, c.construction, c.topology)
            for n, c in ((n, cls.card) for n, cls in known.items())
        ],
    )  # fmt: skip
    show(
        "In a pretrained model (learned: parameters of its own; needs: besides q, k, v)",
        {
            "mechanism": "words", "untrained": "text", "learned": "text", "needs": "text",
            "honours": "text", "operations": "text",
        },
        [_running(mechanism(n)) for n in known],
    )  # fmt: skip
    show(
        "Wrappers, behind any mechanism, from left to right: 'mita(m=25,k=25)+dwc+gate'",
        {"wrapper": "words", "options": "text", "what it does": "text"},
        [
            (f"+{n}", ", ".join(_option(f) for f in fields(w.options_type)) or "none", w.summary)
            for n, w in WRAPPERS.items()
        ],
    )
    if everything:
        show(
            "Sources",
            {"mechanism": "words", "paper": "text"},
            [(n, cls.card.source) for n, cls in known.items()],
        )
        show(
            "Options",
            {"mechanism": "words", "option": "text", "default": "words"},
            [
                (None if number else n, _option(entry, default=False), _shown(entry.default))
                for n, cls in known.items()
                for number, entry in enumerate(fields(cls.options_type))
            ],
        )
        show(
            "Compared with them in papers, but no mechanisms",
            {"name": "words", "what it is": "text"},
            list(OUTSIDE.items()),
        )
    _others()
    out.print("All about one: mitaswap ls NAME. Everything: mitaswap ls --all.", markup=False)


def _running(part: Mechanism) -> tuple[str, ...]:
    from mitaswap.mechanisms import learned_numbers

    card, needs = part.card, sorted(part.needs)
    return (
        part.name,
        card.untrained,
        "yes" if learned_numbers(part) else "nothing",
        ", ".join(needs) or "nothing",
        ", ".join(sorted(part.supports)) or "nothing",
        card.cost,
    )


def _one(name: str) -> None:
    """All about one mechanism as it is configured and about what is around it, or about a wrapper
    alone.
    """
    from mitaswap.mechanisms import MECHANISMS, WRAPPERS, Wrapper, learned_numbers, mechanism

    spec = Spec.parse(name.strip().removeprefix("+"))
    if name.strip().startswith("+"):
        WRAPPERS.get(spec.name)  # an unknown one is looked for among the wrappers
    alone = spec.name in WRAPPERS and spec.name not in MECHANISMS
    if alone:  # around the mechanism that any wrapper suits, to have its options checked
        own = Spec(spec.name, spec.options)
        spec = Spec("standard", {}, (own, *spec.wrappers))
    part = mechanism(spec)
    learned = learned_numbers(part)  # what is impossible is an error before anything is printed
    parts: list[Any] = [part]
    while isinstance(parts[0], Wrapper):
        parts.insert(0, parts[0].inner)
    if len(parts) > 1 and not alone:
        out.print(f"{part.spec}, from the inside out", style="bold", markup=False)
        show("", {"about": "text", "": "text"}, [*_reading(part, learned), *_cost(part)])
        out.print()
    for each in parts[1:] if alone else parts:
        _part(each)


def _part(part: Mechanism) -> None:
    """One mechanism, or one wrapper, without what is inside it."""
    from mitaswap.mechanisms import mechanism
    from mitaswap.results import addresses
    from mitaswap.tokens import TokenLayout

    cls: Any = type(part)
    inner = getattr(part, "inner", None)
    numbers = sum(p.numel() for p in part.parameters())
    own = numbers - sum(p.numel() for p in inner.parameters()) if inner else numbers
    sources = cls.__doc__ if inner else cls.card.source
    about = [("link", ", ".join(addresses(" ".join(sources.split())).values()) or "none")]
    if inner:
        reads = sorted(cls(mechanism("standard"), part.options).needs)  # by itself
        needs = ", ".join(["q, k, v", *reads])
        learned = f"{own:,} parameters {_site(part)}"
        about = [("does", cls.summary), *about, ("needs", needs), ("learned", learned)]
    else:
        limits = "\n".join(f"{spec} is {limit}" for spec, limit in cls.limits) or "none"
        card = [(f.name.replace("_", " "), getattr(cls.card, f.name)) for f in fields(cls.card)]
        papers = [("the paper's", cls.paper)] if cls.paper else []
        small = part.fitting(TokenLayout(1, (14, 14)), 64)  # defaults are for longer sequences
        papers += [("at 14x14 patches", str(small.spec))] if small else []
        about = [*card, *about, *papers, ("limits", limits), *_reading(part, own), *_cost(part)]
    out.print(f"+{cls.name}" if inner else cls.name, style="bold", markup=False)
    out.print(_flowing(cls.__doc__ or ""), markup=False, highlight=False)
    show("", {"about": "text", "": "text"}, about)
    meanings = _described(cls.options_type)
    if fields(cls.options_type):
        show(
            "Options",
            {"option": "text", "default": "words", "meaning": "text"},
            [
                (_option(e, default=False), _shown(e.default), meanings.get(e.name, ""))
                for e in fields(cls.options_type)
            ],
        )


def _cost(part: Mechanism) -> list[tuple[str, str]]:
    """What one attention core costs in a layer of DeiT-S; nothing where it does not tell or fit."""
    from mitaswap.mechanisms import mechanism, usual_site

    try:
        cost = mechanism(part.spec).cost(usual_site(part, heads=6))
    except (MitaswapError, NotImplementedError):
        return []
    more = f"; empty slots of the reference: {cost.padding / 1e6:.1f} more" if cost.padding else ""
    flops = f"{cost.flops / 1e6:.1f} MFLOPs (a multiply-add is two{more})"
    moved = f"{cost.bytes() / 1e6:.2f} MB moved in half precision"
    return [("one image", f"{flops}, {moved}, {_site(part, heads=6)}")]


def _site(part: Mechanism, heads: int = 3) -> str:
    """Where the numbers of a description are from."""
    from mitaswap.mechanisms import usual_site

    site = usual_site(part, heads)
    pixels = 16 * site.layout.grid[0]
    name = "DeiT-T" if heads == 3 else "DeiT-S"
    return f"for {heads} heads of 64 at {site.layout} tokens (a layer of {name} at {pixels})"


def _reading(part: Mechanism, learned: int) -> list[tuple[str, str]]:
    """What a mechanism reads of a site and what it learns there."""
    return [
        ("needs", ", ".join(["q, k, v", *sorted(part.needs)])),
        ("honours", ", ".join(sorted(part.supports)) or "no bias, mask or dropout"),
        ("learned", f"{learned:,} parameters {_site(part)}"),
    ]


def _flowing(docstring: str) -> str:
    """A docstring whose paragraphs are lines, for terminals of any width."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(re.sub(r"\n(?! )", " ", text) for text in paragraphs)


def _described(options: type) -> dict[str, str]:
    """The meaning of every option, from the docstrings of its class and of the classes above."""
    found: dict[str, str] = {}
    entries = re.compile(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", re.DOTALL | re.MULTILINE)
    for cls in reversed(options.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "").partition("Args:")[2]
        for name, meaning in entries.findall(text):
            found[name] = " ".join(meaning.split())
    return found


def _others() -> None:
    from mitaswap.data import SETS
    from mitaswap.figures import FIGURES
    from mitaswap.models.embedded import embedded_names
    from mitaswap.stats import STATISTICS
    from mitaswap.studies import STUDIES

    sets = [name for name, source in SETS.items() if source.embedded]
    others = "DIRECTORY of class folders, FILE.parquet, torch/NAME, hfds/NAME, wds/NAME (timm's)"
    show(
        "Everything else",
        {"kind": "words", "names": "text"},
        [
            ("embedded models", ", ".join(f"embedded:{n}" for n in embedded_names()) or "none"),
            ("data sets", f"{', '.join(sets)}, {others}"),
            *(("statistic", f"{name}: {s.summary}") for name, s in STATISTICS.items()),
            ("studies", ", ".join(STUDIES.names())),
            *(("figure", f"{name}: {figure.title}") for name, figure in FIGURES.items()),
        ],
    )


def _option(entry: Any, default: bool = True) -> str:
    """`name: int = 4`, or the words that can be chosen."""
    kind = str(entry.type).replace("Literal[", "").rstrip("]").replace('"', "").replace("'", "")
    kind = kind.replace(", ", " | ")
    return f"{entry.name}: {kind} = {_shown(entry.default)}" if default else f"{entry.name}: {kind}"


def _shown(default: object) -> str:
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)
