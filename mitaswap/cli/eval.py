"""`mitaswap eval`: cross-mechanism matrices, sweeps and statistics."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mitaswap.cli import _options as opt
from mitaswap.cli._app import Stopped, app, err, out
from mitaswap.cli._models import labelled
from mitaswap.cli._progress import Bar
from mitaswap.cli._tables import show
from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec, Value, split_top_level

if TYPE_CHECKING:
    from mitaswap.studies import Plan


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models; NAME=MODEL names one, and where NAME is a mechanism says what it was "
            "trained with.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Data set: digits, digit-scenes, a directory, a .parquet file, torch/cifar10, ..."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Run directory; the same command continues it.")
    ],
    split: Annotated[
        Optional[str], typer.Option(help="Split of the data set; default: test or validation.")
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(min=1, metavar="N", help="Use only so many images, evenly spaced."),
    ] = None,
    run: Annotated[
        Optional[str],
        typer.Option(
            help="Mechanisms to run every model with, comma separated, options and wrappers "
            "allowed: 'mita(m=9)+dwc'; or a group: usable (approximate softmax attention "
            "without training), parameter-free, untrained (both), all."
        ),
    ] = None,
    grid: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="AXES",
            help="Sweep: 'K,N' (defaults), 'K=9,16,25' or any option 's=1,2'; repeat for more "
            "axes.",
        ),
    ] = None,
    stats: Annotated[
        Optional[str], typer.Option(help="Statistics of the routing, for instance overlap.")
    ] = None,
    layers: opt.Layers = "*",
    batch_size: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, metavar="N", help="Images per forward.")
    ] = 64,
    device: opt.Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    workers: Annotated[
        int,
        typer.Option("-j", "--workers", min=0, metavar="N", help="Processes that decode images."),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of generated data sets and random weights.")] = 0,
    arch: opt.Arch = None,
    pretrained: opt.Pretrained = True,
    trust_remote_code: opt.RemoteCode = False,
) -> None:
    """Measure models run with mechanisms they were and were not trained with.

    Example: `mitaswap eval embedded:standard embedded:mita --data digit-scenes --limit
        500 --run standard,mita --grid "K=9,25" --grid "N=9,25" --stats overlap -o runs/try`
    """
    from mitaswap.evaluation import Settings
    from mitaswap.results import provenance
    from mitaswap.studies import Plan, Workbench, cells_of, open_run, run_cells

    named = labelled(models)
    plan = Plan(
        models={model.label: model.name for model in named},
        trained={model.label: model.trained for model in named if model.trained},
        settings=Settings(data, split, limit, batch_size, device, dtype, workers, seed),
        run=tuple(Spec.parse(part) for part in opt.items("--run", run)),
        grid=_axes(grid or []),
        stats=tuple(opt.items("--stats", stats)),
        layers=layers,
        model_options=opt.model_options(arch, pretrained, trust_remote_code),
    )
    with Bar() as bar:
        bench = Workbench(plan, on_decode=bar.decoded)
        cells = cells_of(plan, bench)
        asked = {**plan.to_dict(), **bench.contents()}
        origin = provenance(str(plan.settings.torch_device), dtype, seed)
        with open_run(output, asked, origin) as rows:
            bench.recall(rows.rows)
            left = [cell for cell in cells if cell.key not in rows.done]
            if len(left) < len(cells):
                err.print(
                    f"continuing {output}: it has {len(cells) - len(left)} of {len(cells)} cells",
                    markup=False,
                    soft_wrap=True,
                )
            bar.start(sum(cell.images for cell in left))
            try:
                run_cells(left, rows, lambda cell, _: bar.cell(cell.label), bar.images)
            except KeyboardInterrupt:
                raise Stopped(
                    f"{len(rows.done)} of {len(cells)} cells are in {output}; the same command "
                    "continues there."
                    if rows.done
                    else "no cell was finished; the same command starts again."
                ) from None
    _show(output, plan)


def _axes(texts: list[str]) -> dict[str, tuple[Value, ...] | None]:
    """`["K,N"]` gives K and N without values, `["K=9,16", "s=1,2"]` axes with theirs."""
    axes: dict[str, tuple[Value, ...] | None] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        named = [name.strip()] if equals else split_top_level(text)
        if not all(named) or not named:
            raise MitaswapError(f'--grid {text!r} names no axis; for instance --grid "K=9,16,25"')
        for axis in named:
            if axis in axes:
                raise MitaswapError(f"--grid names the axis {axis!r} twice")
            axes[axis] = None
        if equals:
            found = [
                Spec.parse(f"axis(value={v})").options["value"] for v in split_top_level(values)
            ]
            if not found:
                raise MitaswapError(
                    f'--grid {text!r} has no values; for instance --grid "{name}=9,16,25"'
                )
            axes[name.strip()] = tuple(dict.fromkeys(found))
    return axes


def _show(output: Path, plan: Plan) -> None:
    """The tables at the end: top-1 with its interval, and each statistic layer by layer."""
    from mitaswap.results import load_rows

    rows = load_rows(output)
    scored = rows[rows["study"].isin(["matrix", "grid"])]
    # a cell of the matrix may be a point of the grid too; the matrix comes first
    scored = scored.sort_values("study", key=lambda study: study != "matrix", kind="stable")
    lines = scored.drop_duplicates(["model", "run_with"]).to_dict("records")
    show(
        f"top-1 on {plan.settings.data}, {lines[0]['images']:.0f} images "
        "(bold: run with what it was trained with)",
        {
            "model": "text", "trained with": "text", "run with": "text",
            "top-1 %": "number", "95% range": "number", "img/s": "number",
        },
        [_line(row) for row in lines],
        [row["trained_with"] == row["run_with"] for row in lines],
    )  # fmt: skip
    if "statistic" in rows:
        for statistic, found in rows.groupby("statistic", sort=False):
            by = ["model", "run_with", "layer"]
            means = found.groupby(by, sort=False)[["value", "chance"]].mean().reset_index()
            show(
                f"{statistic}, mean over heads",
                {
                    "model": "text", "run with": "text", "layer": "number",
                    "mean": "number", "chance": "number",
                },
                [
                    (
                        row["model"], row["run_with"], int(row["layer"]) + 1,
                        f"{row['value']:.3f}", f"{row['chance']:.3f}",
                    )
                    for row in means.to_dict("records")
                ],
            )  # fmt: skip
    out.print(
        f"rows: {output / 'rows.jsonl'}   report: mitaswap report {shlex.quote(str(output))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _line(row: dict[Any, Any]) -> list[str]:
    return [
        row["model"],
        row["trained_with"],
        row["run_with"],
        f"{row['top1']:.2f}",
        f"{row['top1_low']:.1f}-{row['top1_high']:.1f}",
        f"{row['infer_samples_per_sec']:.0f}",
    ]
