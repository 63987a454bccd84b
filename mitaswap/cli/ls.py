"""`mitaswap ls`: what there is to choose from."""

from __future__ import annotations

from dataclasses import fields

from mitaswap.cli._app import app
from mitaswap.cli._tables import show


@app.command()
def ls() -> None:
    """List mechanisms, embedded models, data sets, statistics, studies and figures.

    Example: `mitaswap ls`
    """
    from mitaswap.data import SETS
    from mitaswap.figures import FIGURES
    from mitaswap.mechanisms import MECHANISMS, mechanism
    from mitaswap.models.embedded import embedded_names
    from mitaswap.stats import STATISTICS
    from mitaswap.studies import STUDIES

    known = dict(MECHANISMS.items())
    cards = {name: cls.card for name, cls in known.items()}
    show(
        "Mechanisms (the five dimensions of the MiTA paper's Tab. 1)",
        {
            "mechanism": "words", "strategy": "text", "expert type": "text",
            "count": "text", "construction": "words", "topology": "words",
        },
        [
            (name, c.strategy, c.expert_type, c.expert_count, c.construction, c.topology)
            for name, c in cards.items()
        ],
    )  # fmt: skip
    show(
        "Where they come from",
        {"call string": "words", "operations": "words", "honours too": "text", "source": "text"},
        [
            (
                mechanism(name).spec,
                cls.card.cost,
                ", ".join(sorted(cls.supports)) or "nothing",
                cls.card.source,
            )
            for name, cls in known.items()
        ],
    )
    show(
        "Options",
        {"mechanism": "words", "option": "text", "default": "words"},
        [
            (
                None if number else name,
                f"{entry.name}: {_kind(str(entry.type))}",
                str(entry.default).lower() if entry.default is None else entry.default,
            )
            for name, cls in known.items()
            for number, entry in enumerate(fields(cls.options_type))
        ],
    )
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


def _kind(annotation: str) -> str:
    return annotation.replace("Literal[", "").rstrip("]").replace("'", "").replace(", ", " | ")
