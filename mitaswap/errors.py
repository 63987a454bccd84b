"""The one exception that means "the request cannot be honoured", and its wording.

Anything a user can cause (an unknown name, an impossible option, a broken file) is a
`MitaswapError`: one message that says what was given, what is allowed, the nearest name and the
next step. The CLI prints it without a traceback and exits with code 2. Errors of the program itself
stay ordinary exceptions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class MitaswapError(ValueError):
    """A request that cannot be honoured, explained in one message."""


class SwapError(MitaswapError):
    """A site that a mechanism cannot honour, or a swapped model used in a way the seam cannot
    serve.
    """


def unknown(kind: str, given: str, allowed: Iterable[str], hint: str = "") -> MitaswapError:
    """The error for a name nobody knows: nearest names first, then all that are allowed.

    Args:
        kind: what was looked up, in the singular ("mechanism", "option of mita").
        given: the name that was asked for.
        allowed: the names that exist.
        hint: the next step, a sentence ("`mitaswap ls` lists them.").
    """
    names = sorted(allowed)
    near = [repr(name) for name in nearest(given, names)]
    parts = [f"unknown {kind} {given!r}."]
    if near:
        *others, last = near
        parts.append(f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?")
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    parts.append(f"Allowed: {shown}." if names else "None exist.")
    if hint:
        parts.append(hint)
    return MitaswapError(" ".join(parts))


def nearest(given: str, names: Iterable[str]) -> list[str]:
    """At most three of the names that may be meant, whatever their case: the same; else those that
    begin with what was given, the shortest first; else those with all its words (`attn.0` is in
    `blocks.0.attn`); else the one that is spelled most alike.
    """
    folded = {name: name.casefold() for name in sorted(names)}
    text = given.casefold()
    words = _words(text)
    rules = (
        [name for name, other in folded.items() if other == text],
        [name for name, other in folded.items() if text and other.startswith(text)],
        [name for name, other in folded.items() if words and words <= _words(other)],
    )
    for found in rules:
        if found:
            return sorted(found, key=len)[:3]
    alike = difflib.get_close_matches(text, folded.values(), n=1, cutoff=0.5)
    return [name for name, other in folded.items() if other in alike][:3]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text))
