"""Multiply-adds of DeiT-T and DeiT-S at 224 px with every mechanism: the paper's FLOPs columns."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from timing import write_rows

from mitaswap.mechanisms import MECHANISMS, mechanism
from mitaswap.models import open_model
from mitaswap.spec import Spec
from mitaswap.studies._cost import body_flops, cores_cost
from mitaswap.surgery import walk
from mitaswap.tokens import TokenLayout

#: what the paper prints, Tab. 2 and 3 (one digit; its InLine-DeiT-S is another backbone)
PAPER = {
    ("tiny", "standard"): "1.2",
    ("tiny", "linear"): "1.1",
    ("tiny", "polaformer"): "1.2",
    ("tiny", "mhla(m=16)"): "1.1",
    ("tiny", "focused+dwc(kernel=5)"): "1.1",
    ("tiny", "bra(n=49)"): "1.1",
    ("tiny", "agent(n=49)"): "1.1",
    ("tiny", "agent(n=49,bias=true)"): "1.2",
    ("tiny", "mita(m=25,k=25)"): "1.1",
    ("tiny", "mita(m=25,k=25)+dwc"): "1.1",
    ("small", "standard"): "4.6",
    ("small", "agent(n=49)"): "4.4",
    ("small", "agent(n=49,bias=true)"): "4.4",
    ("small", "mita(m=25,k=25)"): "4.4",
    ("small", "mita(m=25,k=25)+dwc"): "4.4",
    ("small", "mita(m=25,k=25)+dwc+gate"): "4.7",
    ("small", "sparsifiner(k=49)"): "4.5",
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    grid = TokenLayout(1, (14, 14))  # the defaults, or what is suggested where they exceed it
    specs = [str(mechanism(Spec(name, cls.suggest(grid))).spec) for name, cls in MECHANISMS.items()]
    specs = list(dict.fromkeys([*specs, *(spec for _, spec in PAPER)]))
    table = Table(title="GMACs of one 224 px image (paper in brackets)")
    for column in ("attention", "DeiT-T", "its cores", "DeiT-S", "its cores"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for size in ("tiny", "small"):
        network = open_model(f"timm:deit_{size}_patch16_224", pretrained=False)
        sites = walk(network.module, network.example(2))
        body = body_flops(network, sites)
        for spec in specs:
            cores = cores_cost({site.path: mechanism(spec) for site in sites}, sites).flops
            found[size, spec] = (body + cores) / 2e9, cores / 2e9
    rows = []
    for spec in specs:
        cells = []
        for size in ("tiny", "small"):
            whole, cores = found[size, spec]
            paper = PAPER.get((size, spec))
            cells += [f"{whole:.2f}" + (f" ({paper})" if paper else ""), f"{cores:.3f}"]
            row = {"benchmark": "flops", "model": f"deit_{size}_patch16_224", "variant": spec}
            rows.append({**row, "gmacs": round(whole, 4), "attn_gmacs": round(cores, 4)})
        table.add_row(spec, *cells)
    Console().print(table, f"rows: {write_rows('flops', rows)}")


if __name__ == "__main__":
    main()
