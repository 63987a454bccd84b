"""A table of named variants, filled by the files of one folder.

Mechanisms, statistics, figures, studies and data sources are each a `Registry`: a variant is one
file in the registry's package that decorates its class or function with
`@REGISTRY.register("name")`. Other distributions add theirs through an entry point in the group of
the package's name (`mitaswap.mechanisms`, ...).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from mitaswap.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to variants of one kind.

    Args:
        kind: what the entries are, in the singular; used in error messages.
        package: dotted name of the package whose public modules register the variants. They are
            imported on the first look-up, not before, so that importing a registry stays cheap.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a class or function under `name` and tells it so (`entry.name`)."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            entry.name = name  # type: ignore[attr-defined]
            return entry

        return enter

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: a variant may look another one up
        try:
            self._import_all()
        except BaseException:
            self._loaded = False  # a broken variant fails the next look-up too, by its own error
            raise

    def _import_all(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            point.load()

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            MitaswapError: no such entry; the nearest name is suggested.
        """
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise unknown(self.kind, name, self._entries, "`mitaswap ls` lists them.") from None

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """All (name, entry) pairs, in alphabetical order."""
        return ((name, self._entries[name]) for name in self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries
