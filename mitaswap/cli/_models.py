"""The MODEL arguments of `mitaswap eval`: NAME=MODEL taken apart, and a label for each."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from mitaswap.errors import MitaswapError, unknown
from mitaswap.spec import Spec


class Model(NamedTuple):
    """One model of a plan.

    Args:
        label: its name in rows and figures.
        name: what `open_model` takes.
        trained: what it was trained with, where the user says so.
    """

    label: str
    name: str
    trained: str | None


def labelled(texts: list[str]) -> list[Model]:
    """The models of the command line, each under a label of its own.

    Raises:
        MitaswapError: a NAME that looks like a mistyped mechanism, or two models of one name.
    """
    models = [_model(text) for text in texts]
    labels = [model.label for model in models]
    for i, (text, model) in enumerate(zip(texts, list(models), strict=True)):
        if labels.count(model.label) == 1:
            continue
        if model.trained:  # several trained with one mechanism: each under its own name
            models[i] = model._replace(label=_base_name(model.name))
        elif model.name == text:  # of one base name: called as they were typed
            models[i] = model._replace(label=text)
    labels = [model.label for model in models]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise MitaswapError(f"two models are called {twice!r}; give them names: NAME=MODEL")
    return models


def _model(text: str) -> Model:
    from mitaswap.mechanisms import MECHANISMS, mechanism

    head, tail = _partition(text)
    if not head:  # an empty one would be the working directory
        if not text.strip():
            raise MitaswapError("an empty MODEL; `mitaswap ls` lists those in the package")
        return Model(_base_name(text), text, None)
    if not tail:
        raise MitaswapError(f"{text!r} names no model: expected NAME=MODEL, or MODEL alone")
    name = Spec.parse(head).name
    if name in MECHANISMS:
        mechanism(head)  # its options are right
        return Model(head, tail, head)
    if difflib.get_close_matches(name.casefold(), MECHANISMS.names(), n=1, cutoff=0.75):
        raise unknown(
            "mechanism", name, MECHANISMS.names(), "Other names of models must not look like one."
        )
    return Model(head, tail, None)


def _base_name(name: str) -> str:
    base = name if Path(name).exists() else Spec.parse(name).name.rpartition(":")[2]
    return Path(base).name or name


def _partition(text: str) -> tuple[str, str]:
    """NAME and MODEL of NAME=MODEL; no name where the equals sign belongs to a path or option."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "=" and depth == 0:
            is_path = any(sign in text[:i] for sign in "/\\:") or Path(text).exists()
            return ("", text) if is_path else (text[:i].strip(), text[i + 1 :].strip())
    return "", text
