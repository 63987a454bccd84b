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


def explain(name: str) -> None:
    """Raise `MitaswapError` if `name` is one of `OUTSIDE`, whatever its spelling."""

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    for known, why in OUTSIDE.items():
        if plain(known) == plain(name):
            raise MitaswapError(f"{known} is not an attention mechanism but {why}")
