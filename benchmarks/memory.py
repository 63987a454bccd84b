"""Peak memory of every mechanism over the number of tokens, on the CPU, each size in a process of
its own, and how it grows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from core import DIM, HEADS, resident
from rich.console import Console
from rich.table import Table
from timing import write_rows
from torch import Tensor

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.mechanisms import MECHANISMS, Mechanism

#: options for long sequences where the defaults are counts of blocks: blocks of one size, measured
#: beside the defaults
LONG = {
    "bra": lambda n: {"n": n // 64, "k": 4},
    "moba": lambda n: {"n": n // 64, "k": 4},
    "pvt": lambda n: {"reduction": "pool", "size": 16},
    "dat": lambda n: {"stride": math.isqrt(n) // 16},
    "reformer": lambda n: {"buckets": 64},
}


def suggested(name: str, tokens: int) -> Spec:
    """A mechanism with its default options, or others that fit where these do not."""
    side = math.isqrt(tokens)
    return mechanism(Spec(name, MECHANISMS.get(name).suggest(TokenLayout(0, (side, side))))).spec


def families(names: list[str]) -> Iterator[tuple[str, Callable[[int], Spec]]]:
    """Names and their specs at a length, in the order of the table."""
    for name in names:
        yield name, partial(suggested, name)
        if long := LONG.get(name):
            yield name, lambda n, name=name, long=long: mechanism(Spec(name, long(n))).spec


def peak(spec: Spec, tokens: int) -> float:
    """MiB that one forward adds at its peak to the memory of this very process (Linux)."""
    side = math.isqrt(tokens)
    layout = TokenLayout(0, (side, side))
    part = mechanism(spec)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    extra = _extra(part, tokens)
    _warm(part)
    with torch.inference_mode():
        return resident(lambda: part(q, k, v, layout=layout, **extra))


def _extra(part: Mechanism, tokens: int) -> dict[str, Any]:
    """What a mechanism is handed besides q, k and v, of random numbers."""
    width = HEADS * DIM
    extra: dict[str, Any] = {"x": torch.randn(1, tokens, width)} if "x" in part.needs else {}
    if "project" in part.needs:
        weight = torch.randn(width, 2 * width) * width**-0.5

        def project(rows: Tensor) -> tuple[Tensor, ...]:
            return (rows @ weight).unflatten(2, (2, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind()

        extra["project"] = project
    return extra


def _warm(part: Mechanism) -> None:
    """A first call of the same code at a small size: libraries load what they need."""
    layout = TokenLayout(0, (16, 16))
    small = mechanism(Spec(part.name, type(part).suggest(layout)))
    q = torch.randn(1, HEADS, layout.tokens, DIM)
    extra = _extra(small, layout.tokens)
    with torch.inference_mode():
        small(q, q, q, layout=layout, **extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--only", nargs="+", help="names of mechanisms")
    parser.add_argument("--peak", nargs=2, metavar=("SPEC", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(Spec.parse(args.peak[0]), int(args.peak[1]))))
        return
    first, last = args.tokens[0], args.tokens[-1]
    own = 4 * HEADS * last * DIM * 4 / 2**20
    table = Table(
        title=f"MiB added at the peak, B=1, H={HEADS}, d={DIM}, float32 (at N={last:,} q, k, v and "
        f"output are {own:.0f}, one N x N matrix of one head {last**2 * 4 / 2**20:,.0f})"
    )
    table.add_column(f"mechanism (options at N={last:,})", overflow="fold")
    for tokens in args.tokens:
        table.add_column(f"N={tokens:,}", justify="right")
    table.add_column(f"x {last // first} tokens: x memory", justify="right")
    table.add_column("looks at all pairs")
    rows = []
    for name, spec_of in families(args.only or MECHANISMS.names()):
        found = []
        for tokens in args.tokens:
            spec = spec_of(tokens)
            command = [sys.executable, __file__, "--peak", str(spec), str(tokens)]
            # freed blocks go back at once, or the peak would be the allocator's, not the work's
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
            found.append(float(json.loads(subprocess.check_output(command, env=environment))))
            rows.append(
                {
                    "benchmark": "memory",
                    "variant": str(spec),
                    "mechanism": name,
                    "tokens": tokens,
                    "peak_mib": round(found[-1], 1),
                }
            )
        pairs = "yes" if "every-pair" in mechanism(spec).traits else ""
        growth = f"{found[-1] / found[0]:.1f}"
        table.add_row(str(spec), *(f"{value:,.0f}" for value in found), growth, pairs)
    written = write_rows("memory", rows, part="mechanism" if args.only else "")
    Console().print(table, f"rows: {written}")


if __name__ == "__main__":
    main()
