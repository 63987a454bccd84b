"""The one exception that means "the request cannot be honoured", and its wording.

Anything a user can cause (an unknown name, an impossible option, a broken file) is a
`MitaswapError`: one message that says what was given, what is allowed, the nearest name and the
next step. The CLI prints it without a traceback and exits with code 2. Errors of the program itself
stay ordinary exceptions.
"""

from __future__ import annotations

import difflib
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
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    parts = [f"unknown {kind} {given!r}."]
    if near:
        parts.append(f"Did you mean {near[0]!r}?")
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    parts.append(f"Allowed: {shown}." if names else "None exist.")
    if hint:
        parts.append(hint)
    return MitaswapError(" ".join(parts))
