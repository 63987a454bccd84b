"""What the evaluation adds to bare forward passes: per cell, and for a grid of 25 cells over one
data set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import in_turn, paired_ratio, quantiles, write_rows

from mitaswap.data import decode, open_set
from mitaswap.evaluation import Settings, batches, measure
from mitaswap.results import provenance
from mitaswap.spec import Spec
from mitaswap.studies import Plan, Workbench, cells_of, open_run, run_cells

VALUES = (4, 9, 16, 25, 36)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:mita")
    parser.add_argument("--data", default="digit-scenes")
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    settings = Settings(args.data, limit=args.limit)
    plan = Plan({"model": args.model}, settings, grid={"K": VALUES, "N": VALUES})
    bench = Workbench(plan)
    cell = one_cell(bench, args.rounds)
    grid = whole_grid(plan, args.rounds)
    rows = [{"benchmark": "cells", **row} for row in (*cell, *grid)]
    table = Table(title=f"{args.model} on {args.limit} images of {args.data}")
    for column in ("what", "bare ms", "mitaswap ms", "ratio"):
        table.add_column(column)
    for bare, ours in (cell, grid):
        table.add_row(
            bare["what"], f"{bare['ms_q50']:.0f}", f"{ours['ms_q50']:.0f}", f"{bare['ratio']:.3f}"
        )
    Console().print(table, f"rows: {write_rows('cells', rows)}")


def one_cell(bench: Workbench, rounds: int) -> list[dict[str, object]]:
    """A cell's measurement against the forwards of the same swapped model on the same batches."""
    decoded = bench.images.decoded(bench.network("model"))
    with bench.swapped("model", Spec("mita")) as (network, _):
        ready = [x for x, _ in batches(network, decoded, bench.settings)]

        def bare() -> None:
            with torch.inference_mode():
                for x in ready:
                    network.module(x)

        def cell() -> None:
            measure(network, decoded, bench.settings)

        seconds = in_turn({"bare": bare, "mitaswap": cell}, rounds)
    return _rows("one cell", seconds)


def whole_grid(plan: Plan, rounds: int) -> list[dict[str, object]]:
    """All that `mitaswap eval` does once the program runs, against one decode and bare forwards.

    Bare is the time of decoding plus that of the forwards of each cell, and nothing else: neither
    opening the network nor finding its sites nor swapping counts.
    """
    network = Workbench(plan).network("model")
    bench = Workbench(plan)

    def bare() -> float:
        start = time.perf_counter()
        images = open_set(plan.settings.data, None, plan.settings.limit)
        decoded = decode(images, network.preprocess.to_uint8)
        seconds = time.perf_counter() - start
        for k in VALUES:
            for m in VALUES:
                with bench.swapped("model", Spec("mita", {"m": m, "k": k})) as (swapped, _):
                    start = time.perf_counter()
                    with torch.inference_mode():
                        for x, _ in batches(swapped, decoded, plan.settings):
                            swapped.module(x)
                    seconds += time.perf_counter() - start
        return seconds

    def ours() -> float:
        start = time.perf_counter()
        bench = Workbench(plan)
        cells = cells_of(plan, bench)
        asked = {**plan.to_dict(), **bench.contents()}
        origin = provenance("cpu", "float32", 0)
        with (
            tempfile.TemporaryDirectory() as folder,
            open_run(Path(folder) / "run", asked, origin) as run,
        ):
            run_cells(cells, run)
        return time.perf_counter() - start

    runs = {"bare": bare, "mitaswap": ours}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(2, rounds // 2)):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(runs[name]())
    return _rows("grid of 25 cells", {name: np.array(v) for name, v in seconds.items()})


def _rows(what: str, seconds: dict[str, np.ndarray]) -> list[dict[str, object]]:
    ratio = paired_ratio(seconds["mitaswap"], seconds["bare"])
    return [
        {"what": what, "variant": name, "ratio": ratio, "rounds": len(values), **quantiles(values)}
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    main()
