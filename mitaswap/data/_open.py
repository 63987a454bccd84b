"""From the name of a data set to the data set: registered sources, paths, and the names of timm."""

from __future__ import annotations

import inspect
import os
import types
import typing
from typing import Any

from mitaswap.data._base import SETS, ImageSet
from mitaswap.errors import MitaswapError, unknown
from mitaswap.spec import Spec, Value


def open_set(
    name: str, split: str | None = None, limit: int | None = None, seed: int = 0
) -> ImageSet:
    """Open a labelled image set.

    Args:
        name: the call string of a registered source (`digits`, `digit-scenes(digits=4)`), the path
            of a directory of class folders, of a `.parquet` file or of a directory of parquet
            shards, or a name of timm's `create_dataset` (`torch/cifar10`, `hfds/...`, `wds/...`);
            each takes options in brackets.
        split: which split; None takes the held-out one (validation, else test), or all of a source
            without splits.
        limit: keep this many images, spread evenly over the split (`ImageSet.limit`).
        seed: for sources that generate their images; others do not change with it.

    Raises:
        MitaswapError: unknown name, option or split, or nothing that can be read there.
    """
    # a path may hold brackets, so what exists is taken as it is written
    spec = Spec(str(name)) if os.path.exists(name) else Spec.parse(name)
    source, options = _source(spec)
    if "seed" in _accepted(source):
        options.setdefault("seed", seed)
    images = source(split, **options)  # type: ignore[arg-type]
    images.name = str(spec)
    images.limit(limit)
    return images


def _source(spec: Spec) -> tuple[type[ImageSet], dict[str, Any]]:
    options = dict(spec.options)
    if spec.name in SETS:
        source = SETS.get(spec.name)
    else:
        for _, source in SETS.items():
            claimed = source.claims(spec.name)
            if claimed is not None:
                options = {**options, **claimed}
                break
        else:
            if "/" in spec.name or spec.name.endswith(".parquet"):
                raise MitaswapError(
                    f"no file or directory {spec.name!r}, and no data set of that name. Paths are "
                    f"relative to {os.getcwd()}; timm's names begin with torch/, hfds/, hfids/, "
                    "tfds/ or wds/."
                )
            raise unknown(
                "data set",
                spec.name,
                SETS.names(),
                "Or give the path of class folders or of parquet files.",
            )
    return source, _checked_options(source, options, spec)


def _accepted(source: type[ImageSet]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(source.__init__).parameters
    return {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)}


def _checked_options(source: type[ImageSet], options: dict[str, Any], spec: Spec) -> dict[str, Any]:
    accepted = _accepted(source)
    hints = typing.get_type_hints(source.__init__)
    is_open = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for key, value in options.items():
        if key not in accepted:
            if is_open:
                continue
            raise unknown(f"option of {spec.name}", key, accepted)
        options[key] = _typed(hints[key], key, value, spec)
    for key, parameter in accepted.items():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and key not in options
        ):
            here = f" or, for what lies here under that name, ./{spec.name}"
            raise MitaswapError(
                f"{spec} needs the option {key}: {spec.name}({key}=...)"
                f"{here if os.path.exists(spec.name) else ''}"
            )
    return options


def _typed(hint: Any, key: str, value: Value, spec: Spec) -> Value:
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise unknown(
            f"value of {key} in {str(spec)!r}:", str(value), [str(a) for a in typing.get_args(hint)]
        )
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise MitaswapError(f"{key}={value!r} in {str(spec)!r} must be of type {names}")
    return value
