"""Call strings such as `mita(m=25,k=25)` and recipes that map layers to them.

The same string is the CLI argument, the column of the results, the axis label of a figure and,
slugged, the stem of a file. Models are named by the same grammar:
`timm:vit_tiny_patch16_224(img_size=32,num_classes=10)`.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from mitaswap.errors import MitaswapError, unknown

Value = Union[int, float, bool, str, None, tuple["Value", ...]]

_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
_BARE = re.compile(r"[A-Za-z0-9_./:+-]+")
#: numbers are decimal: 0x0 is a shape, 1_0 and 2j are words
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Spec:
    """A name with options.

    Args:
        name: mechanism, model or data set.
        options: option name to value, in the order given.
        wrappers: what is around a mechanism, from the inside out: `mita(m=25)+dwc+gate`.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)
    wrappers: tuple[Spec, ...] = ()

    @classmethod
    def parse(cls, text: str | Spec) -> Spec:
        """Read `name` or `name(key=value, ...)`, and `+name` or `+name(...)` behind it.

        Values are decimal numbers, Python strings and tuples, the words true, false and none, or
        bare words (`feature=relu`, `pool=2x4`).

        Raises:
            MitaswapError: the text does not follow the grammar.
        """
        if isinstance(text, Spec):
            return text
        text = text.strip()
        inner, *outer = split_top_level(text, "+") or [text]
        # a path or a model's name may have a plus of its own
        if outer and inner.partition("(")[0].strip().isidentifier():
            spec = cls.parse(inner)
            return cls(spec.name, spec.options, tuple(cls.parse(part) for part in outer))
        name, bracket, rest = text.partition("(")
        name = name.strip()
        if not name or (bracket and not rest.endswith(")")):
            raise MitaswapError(
                f"cannot read {text!r}: expected NAME or NAME(option=value, ...), for instance "
                "'mita(m=25,k=25)'"
            )
        options: dict[str, Value] = {}
        for part in split_top_level(rest[:-1]) if bracket else []:
            key, equals, value = part.partition("=")
            key = key.strip()
            if not equals or not key.isidentifier():
                raise MitaswapError(f"cannot read {part!r} in {text!r}: expected option=value")
            if key in options:
                raise MitaswapError(f"option {key!r} is given twice in {text!r}")
            options[key] = _value(value.strip(), text)
        return cls(name, options)

    def with_options(self, **options: Value) -> Spec:
        """A copy with some options set or replaced."""
        return Spec(self.name, {**self.options, **options}, self.wrappers)

    @property
    def stem(self) -> str:
        """The spec as a file stem: letters, digits, dots and dashes only."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", str(self).replace("=", "")).strip("-.") or "spec"

    def __str__(self) -> str:
        options = ",".join(f"{k}={_show(v)}" for k, v in self.options.items())
        own = f"{self.name}({options})" if options else self.name
        return "+".join([own, *(str(spec) for spec in self.wrappers)])

    def __hash__(self) -> int:
        # what equality sees too: neither the order of the options nor 1 against 1.0
        return hash((self.name, frozenset(self.options), self.wrappers))


def split_top_level(text: str, at: str = ",") -> list[str]:
    """Split at commas (or `at`) outside brackets and quotes: `a,b(c=1,d=2)` gives `a` and
    `b(c=1,d=2)`.
    """
    parts, depth, quote, start, escaped = [], 0, "", 0, False
    for i, char in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == at and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _value(text: str, whole: str) -> Value:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _BARE.fullmatch(text) and not _NUMBER.fullmatch(text):
        return text
    inner = text[1:-1].strip()
    items = split_top_level(inner)
    if text[:1] + text[-1:] in ("()", "[]") and (len(items) > 1 or inner.endswith(",")):
        return tuple(_value(item, whole) for item in items)
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        if _BARE.fullmatch(text):
            return text
        raise MitaswapError(f"cannot read the value {text!r} in {whole!r}") from None
    return _plain(value, text, whole)


def _plain(value: Any, text: str, whole: str) -> Value:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, text, whole) for item in value)
    if not isinstance(value, (int, float, bool, str, type(None))):
        raise MitaswapError(f"the value {text!r} in {whole!r} is neither number, word nor tuple")
    return value


def _show(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return f"({','.join(_show(v) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, str):
        plain = (
            _BARE.fullmatch(value)
            and value.lower() not in _WORDS
            and isinstance(_value(value, value), str)
        )
        return value if plain else repr(value)
    return repr(value)


@dataclass(frozen=True)
class Recipe:
    """Which mechanism goes to which layers.

    Args:
        rules: (pattern, spec) pairs; the first pattern that matches a site decides, a site that
            none matches stays as it is. A pattern is a comma list of site numbers (`3`), ranges
            (`0-5`) and globs over module paths (`blocks.9.*`).
    """

    rules: tuple[tuple[str, Spec], ...]

    @classmethod
    def of(cls, to: str | Spec | Recipe | Mapping[str, str | Spec], layers: str = "*") -> Recipe:
        """A recipe from a spec (for `layers`), from a pattern-to-spec mapping, or from a recipe (as
        it is).
        """
        if isinstance(to, Recipe):
            return to
        if isinstance(to, Mapping):
            return cls(tuple((pattern, Spec.parse(spec)) for pattern, spec in to.items()))
        return cls(((layers, Spec.parse(to)),))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML file that maps layer patterns to specs, first match first."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise MitaswapError(f"cannot read the recipe {str(path)!r}: {error}") from None
        specs = data.values() if isinstance(data, dict) else ()
        if not specs or not all(isinstance(spec, str) for spec in specs):
            raise MitaswapError(
                f"the recipe {str(path)!r} must map layer patterns to mechanisms, for instance\n"
                '  "0-5": mita(m=25,k=25)\n  "blocks.9.*": agent(n=49)'
            )
        return cls.of({str(pattern): spec for pattern, spec in data.items()})

    def to_dict(self) -> dict[str, str]:
        """Pattern to spec string, in order: what `config.json` holds."""
        return {pattern: str(spec) for pattern, spec in self.rules}

    def assign(self, paths: Sequence[str]) -> dict[str, Spec]:
        """The spec of each site that the recipe names.

        Args:
            paths: module paths of the model's sites, in the order of the forward pass.

        Raises:
            MitaswapError: a pattern (or one item of its comma list) matches no site, or no site
                that an earlier rule has not decided.
        """
        chosen: dict[str, Spec] = {}
        for pattern, spec in self.rules:
            named = match_layers(pattern, paths)
            if pattern != "*" and all(path in chosen for path in named):
                raise MitaswapError(
                    f"the rule {pattern!r}: {spec} decides no layer, as the rules before it name "
                    f"all of its layers ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})"
                    ". The first rule that names a layer decides: write exceptions first"
                )
            for path in named:
                chosen.setdefault(path, spec)
        return {path: chosen[path] for path in paths if path in chosen}

    def __str__(self) -> str:
        if len(self.rules) == 1 and self.rules[0][0] == "*":
            return str(self.rules[0][1])
        return "; ".join(f"{pattern}: {spec}" for pattern, spec in self.rules)


def match_layers(pattern: str, paths: Sequence[str]) -> list[str]:
    """The sites that a layer pattern names, in order.

    Raises:
        MitaswapError: an item matches nothing; says how many sites there are and the nearest path.
    """
    found: set[str] = set()
    for item in split_top_level(pattern):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if first > last:
                raise MitaswapError(f"layer range {item!r} is reversed; write {last}-{first}")
            if last >= len(paths):
                raise MitaswapError(
                    f"layer pattern {item!r} is outside the model's {len(paths)} sites "
                    f"(0-{len(paths) - 1})"
                )
            found.update(paths[first : last + 1])
        else:
            hits = [p for p in paths if fnmatch.fnmatchcase(p, item) or p.startswith(item + ".")]
            if not hits:
                raise unknown(
                    "layer pattern",
                    item,
                    paths,
                    "Numbers, ranges (0-5) and globs (blocks.9.*) work.",
                )
            found.update(hits)
    if not found:
        raise MitaswapError(f"the layer pattern {pattern!r} names no layer")
    return [path for path in paths if path in found]
