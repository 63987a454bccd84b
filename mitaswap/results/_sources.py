"""Where the sources can be read that cards and rows name."""

from __future__ import annotations

import re

_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})\b")


def addresses(source: str) -> dict[str, str]:
    """The numbers of arXiv in a text, as they stand there, with their addresses."""
    return {found[0]: f"https://arxiv.org/abs/{found[1]}" for found in _ARXIV.finditer(source)}
