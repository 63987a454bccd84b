"""MiTA's reference against SDPA on the CPU: time over N, and peak memory over N (each size in a
process of its own).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import in_turn, paired_ratio, quantiles, write_rows

from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout

HEADS, DIM = 6, 64


def tensors(tokens: int) -> tuple[list[torch.Tensor], TokenLayout]:
    side = round(tokens**0.5)
    assert side * side == tokens, "sizes are squares here, so that the grid is plain"
    return [torch.randn(1, HEADS, tokens, DIM) for _ in range(3)], TokenLayout(0, (side, side))


def peak(spec: str, tokens: int) -> float:
    """Peak resident memory in MiB that one forward adds, measured in this very process (Linux)."""
    part = mechanism(spec)
    (q, k, v), layout = tensors(tokens)
    small, small_layout = tensors(64)
    with torch.inference_mode():
        part(*small, layout=small_layout)  # libraries load their own memory first
        return resident(lambda: part(q, k, v, layout=layout))


def resident(run: Callable[[], object]) -> float:
    """MiB that a call adds to this process's resident memory at its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="mita(m=25,k=25)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--sdpa-up-to", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.spec, args.peak)))
        return
    part = mechanism(args.spec)
    rows = []
    table = Table(title=f"{args.spec} against SDPA, B=1, H={HEADS}, d={DIM}, float32")
    for column in ("N", "SDPA ms", "MiTA ms", "SDPA / MiTA", "MiTA peak MiB", "q+k+v+o MiB"):
        table.add_column(column, justify="right")
    for tokens in args.tokens:
        (q, k, v), layout = tensors(tokens)
        runs = {"mita": lambda: part(q, k, v, layout=layout)}  # noqa: B023
        if tokens <= args.sdpa_up_to:
            runs["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: B023
        with torch.inference_mode():
            seconds = in_turn(runs, args.rounds)
        command = [sys.executable, __file__, "--spec", args.spec, "--peak", str(tokens)]
        memory = float(json.loads(subprocess.check_output(command)))
        ratio = paired_ratio(seconds["sdpa"], seconds["mita"]) if "sdpa" in seconds else None
        for name, values in seconds.items():
            rows.append(
                {
                    "benchmark": "core",
                    "variant": args.spec if name == "mita" else "sdpa",
                    "tokens": tokens,
                    "peak_mib": memory if name == "mita" else None,
                    "sdpa_over_mita": ratio,
                    **quantiles(values),
                }
            )
        sdpa = f"{quantiles(seconds['sdpa'])['ms_q50']:.1f}" if ratio else "-"
        own = 4 * HEADS * tokens * DIM * 4 / 2**20
        table.add_row(
            f"{tokens:,}",
            sdpa,
            f"{quantiles(seconds['mita'])['ms_q50']:.1f}",
            f"{ratio:.2f}" if ratio else "-",
            f"{memory:.0f}",
            f"{own:.0f}",
        )
    Console().print(table, f"rows: {write_rows('core', rows)}")


if __name__ == "__main__":
    main()
