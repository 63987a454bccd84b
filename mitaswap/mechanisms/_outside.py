"""Names beside which these mechanisms are compared in papers, and which are no mechanisms."""

from __future__ import annotations

from mitaswap.errors import MitaswapError

#: name -> what it is, and what to do instead
OUTSIDE: dict[str, str] = {
    "SViTE": "sparse training of a ViT (Chen et al. 2021): weights and heads are pruned while it "
    "trains, attention stays softmax attention over all tokens. There is nothing to put in its "
    "place; prune the network, then swap any mechanism into it.",
    "ViT-5": "a backbone (Wang et al. 2026): softmax attention with q/k norm, RoPE and registers "
    "behind the patches. It is a site, not a mechanism: every mechanism runs in it, on q and k "
    "after norm and rotation, with the registers as special tokens.",
}

#: names of groups, which stand for many mechanisms where a study takes several
GROUPS = ("all", "usable", "parameter-free", "untrained")


def explain(name: str) -> None:
    """Raise `MitaswapError` if `name` is a group, or one of `OUTSIDE`, whatever its spelling."""
    if name in GROUPS:
        raise MitaswapError(
            f"{name!r} is a group of mechanisms, for `mitaswap eval --run {name}`; name one "
            "mechanism here. `mitaswap ls` lists them, and which are usable untrained."
        )

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    for known, why in OUTSIDE.items():
        if plain(known) == plain(name):
            raise MitaswapError(f"{known} is not an attention mechanism but {why}")
