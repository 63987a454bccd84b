"""`mitaswap bench`: how long attention takes, alone or in a whole model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from mitaswap.cli import _options as opt
from mitaswap.cli._app import Stopped, app, err, out
from mitaswap.cli._progress import Bar
from mitaswap.cli._speeds import show_speeds
from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec, split_top_level

if TYPE_CHECKING:
    from mitaswap.studies.bench import BenchPlan
    from mitaswap.tokens import TokenLayout

#: tokens of the attention core when nothing was asked for
TOKENS = "256,1024,4096"


@app.command()
def bench(
    run: Annotated[
        str,
        typer.Option(
            help="Mechanisms, comma separated: mita(s=2),agent; softmax attention (or the "
            "untouched model) is always measured, too."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Run directory; the same command continues it.")
    ],
    model: Annotated[
        Optional[str],
        typer.Argument(metavar="[MODEL]", help="A whole model; without, the attention core alone."),
    ] = None,
    tokens: Annotated[
        Optional[str],
        typer.Option(
            help=f"Core: numbers of tokens ({TOKENS}), each the squarest grid, or grids: 32x24."
        ),
    ] = None,
    prefix: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Core: class and register tokens in front of each grid."
        ),
    ] = 0,
    heads: Annotated[Optional[str], typer.Option(help="Core: numbers of heads (6).")] = None,
    head_dim: Annotated[Optional[str], typer.Option(help="Core: widths of a head (64).")] = None,
    total_tokens: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            metavar="N",
            help="Core: instead of -b, as many images as have so many tokens together.",
        ),
    ] = None,
    img_size: Annotated[
        Optional[str], typer.Option(help="Model: image sizes, 224,512 or 224x320; default its own.")
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            "-b", "--batch-size", help="Images per call, 1,32; auto: a model's fastest batch."
        ),
    ] = "1",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64; comma separated.")
    ] = "float32",
    direction: Annotated[
        Literal["inference", "train", "both"],
        typer.Option(
            "--bench", metavar="WHAT", help="inference (forward), train (and backward), or both."
        ),
    ] = "inference",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure under torch.compile, too.")
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graph", help="Core: measure replays of a CUDA graph, too: no launch overhead."
        ),
    ] = False,
    channels_last: Annotated[
        bool,
        typer.Option("--channels-last", help="Model: images and convolutions channels last."),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(min=0, metavar="S", help="Time per mechanism and point; at least 5 rounds."),
    ] = 2.0,
    num_warm_iter: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds before those that count, at most.")
    ] = 10,
    device: opt.Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of inputs and random weights.")] = 0,
    arch: opt.Arch = None,
    pretrained: opt.Pretrained = False,
    trust_remote_code: opt.RemoteCode = False,
) -> None:
    """Time mechanisms against softmax attention, round by round in turn, after a check of each
    against its formula in float64; exit code 1 if one fails it.

    Example: `mitaswap bench --run mita,agent --tokens 1024,4096 -b 4 -o runs/bench`

    Example: `mitaswap bench timm:deit_small_patch16_224 --run mita -b auto -o runs/speed`
    """
    core = {
        "--tokens": tokens,
        "--heads": heads,
        "--head-dim": head_dim,
        "--prefix": prefix or None,
    }
    core["--total-tokens"] = total_tokens
    whole = {"--img-size": img_size, "--arch": arch, "--channels-last": channels_last or None}
    odd = core if model else whole
    for option, given in odd.items():
        if given is not None:
            mode = "the attention core, without MODEL" if model else "whole models; give a MODEL"
            raise MitaswapError(f"{option} is for {mode}")

    from mitaswap.benchmark import Effort
    from mitaswap.studies.bench import BenchPlan

    plan = BenchPlan(
        run=tuple(Spec.parse(part) for part in opt.items("--run", run)),
        model=model,
        layouts=() if model else tuple(_layout(t, prefix) for t in _items(tokens or TOKENS)),
        sizes=tuple(_size(text) for text in _items(img_size)) if img_size else (None,),
        batches=tuple(0 if b == "auto" else _count("-b", b) for b in _items(batch_size)),
        total_tokens=total_tokens,
        heads=tuple(_count("--heads", text) for text in _items(heads or "6")),
        head_dims=tuple(_count("--head-dim", text) for text in _items(head_dim or "64")),
        dtypes=tuple(_items(dtype)),
        directions=("inference", "train") if direction == "both" else (direction,),
        modes=("eager", *["compile"] * compiled, *["cuda-graph"] * graphs),
        channels_last=channels_last,
        device=device,
        effort=Effort(seconds, num_warm_iter),
        seed=seed,
        model_options=opt.model_options(arch, pretrained, trust_remote_code) if model else {},
    )
    _run(plan, output)
    failed = show_speeds(output)
    out.print(
        f"rows: {output / 'rows.jsonl'}   report: mitaswap report {shlex.quote(str(output))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if failed:
        raise typer.Exit(1)


def _run(plan: BenchPlan, output: Path) -> None:
    """Measure what is not in the run directory yet."""
    from dataclasses import asdict

    from mitaswap.results import provenance
    from mitaswap.studies import open_run, run_cells
    from mitaswap.studies.bench import bench_cells, rates_of

    with Bar() as bar:
        rates = rates_of(plan)
        cells = bench_cells(plan, rates)
        origin = provenance(plan.device_name, ", ".join(plan.dtypes), plan.seed)
        origin["rates"] = {name: asdict(rate) for name, rate in rates.items()}
        with open_run(output, plan.to_dict(), origin) as rows:
            left = [cell for cell in cells if cell.key not in rows.done]
            if len(left) < len(cells):
                err.print(
                    f"continuing {output}: it has {len(cells) - len(left)} of {len(cells)} cells",
                    markup=False,
                    soft_wrap=True,
                )
            bar.start(sum(cell.images for cell in left), "timing", rate=False)
            try:
                run_cells(left, rows, lambda cell, _: bar.cell(cell.label), bar.images)
            except KeyboardInterrupt:
                raise Stopped(
                    f"{len(rows.done)} of {len(cells)} cells are in {output}; the same command "
                    "continues there."
                    if rows.done
                    else "no cell was finished; the same command starts again."
                ) from None


def _items(text: str) -> list[str]:
    return list(dict.fromkeys(split_top_level(text)))


def _count(option: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise MitaswapError(f"{option} {text!r}: expected whole numbers from 1, comma separated")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _count("--img-size", height), _count("--img-size", width or height)


def _layout(text: str, prefix: int) -> TokenLayout:
    """A grid as it is given, or the squarest one of so many tokens with the prefix."""
    from mitaswap.benchmark import squarest
    from mitaswap.tokens import TokenLayout

    height, cross, width = text.partition("x")
    if cross:
        grid = _count("--tokens", height), _count("--tokens", width)
        return TokenLayout(prefix, grid)
    return squarest(_count("--tokens", text), prefix)
