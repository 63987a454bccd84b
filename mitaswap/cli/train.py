"""`mitaswap train` and `mitaswap finetune`: the same loop, from random or from pretrained
weights.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.progress import TextColumn
from rich.table import Column

from mitaswap.cli import _options as opt
from mitaswap.cli._app import Stopped, app, err, out
from mitaswap.cli._progress import progress as columns
from mitaswap.errors import MitaswapError

if TYPE_CHECKING:
    from mitaswap.models import Network

Pair = tuple[float, float]
Verb = Callable[..., None]


def _fit(
    pretrained: bool,
    model: opt.Model,
    data: Annotated[str, typer.Option(help="Data set to train on, as in `mitaswap eval`.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory to write; the same command continues it."),
    ],
    to: Annotated[
        Optional[str],
        typer.Option(
            help="Mechanism to train with, as 'mita(m=25,k=25)'; default: the model's own."
        ),
    ] = None,
    layers: opt.Layers = "*",
    val_data: Annotated[
        Optional[str], typer.Option(help="Validation data; default: the data set's own split.")
    ] = None,
    train_split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    val_split: Annotated[Optional[str], typer.Option(help="Split to validate on.")] = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="Train on so many images only.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 30,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", help="Images per update.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate, absolute.")] = 1e-3,
    min_lr: Annotated[float, typer.Option(help="Learning rate at the end of the cosine.")] = 1e-5,
    warmup_epochs: Annotated[
        Optional[float],
        typer.Option(help="Epochs of linear warm-up; default: 2, or half of fewer than 4 epochs."),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.05,
    opt_name: Annotated[str, typer.Option("--opt", help="A timm optimizer.")] = "adamw",
    sched: Annotated[str, typer.Option(help="cosine or constant.")] = "cosine",
    clip_grad: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    amp: Annotated[str, typer.Option(help="bf16, none, or auto (bf16 on a GPU).")] = "auto",
    no_aug: Annotated[
        bool, typer.Option("--no-aug", help="Train on the pixels that evaluation sees.")
    ] = False,
    aa: Annotated[
        Optional[str],
        typer.Option(help="timm auto-augment string, for instance rand-m9-mstd0.5-inc1."),
    ] = None,
    scale: Annotated[Pair, typer.Option(help="Crop area, smallest and largest share.")] = (
        0.08,
        1.0,
    ),
    ratio: Annotated[Pair, typer.Option(help="Crop aspect ratio, smallest and largest.")] = (
        3 / 4,
        4 / 3,
    ),
    hflip: Annotated[float, typer.Option(help="Probability of a horizontal flip.")] = 0.5,
    color_jitter: Annotated[float, typer.Option(help="Colour jitter strength.")] = 0.4,
    reprob: Annotated[float, typer.Option(help="Probability of random erasing.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Mixup alpha; 0 for none.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="CutMix alpha; 0 for none.")] = 0.0,
    eval_every: Annotated[int, typer.Option(help="Epochs between two validations.")] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, shuffling and augmentation.")] = 0,
    device: opt.Device = "auto",
    workers: Annotated[
        int,
        typer.Option(
            "-j",
            "--workers",
            min=0,
            help="Processes that load images; default: one per core, 4 at most.",
        ),
    ] = min(4, os.cpu_count() or 1),
    arch: opt.Arch = None,
    trust_remote_code: opt.RemoteCode = False,
) -> None:
    """What both verbs do; all parameters but the first are their options."""
    import torch

    from mitaswap.checkpoint import open_network, save, training_with
    from mitaswap.data import open_set
    from mitaswap.surgery import convert, recipe_of, revert, swapped_sites
    from mitaswap.train import TrainConfig
    from mitaswap.train import train as run_training

    if to is None and layers != "*":
        raise MitaswapError("--layers goes with --to MECHANISM")
    if warmup_epochs is None:
        warmup_epochs = min(2.0, epochs / 2)
    config = TrainConfig(
        epochs=epochs, batch_size=batch_size, lr=lr, min_lr=min_lr, warmup_epochs=warmup_epochs,
        weight_decay=weight_decay, opt=opt_name, sched=sched, clip_grad=clip_grad or None,
        smoothing=smoothing, amp=amp, seed=seed, no_aug=no_aug, aug=aa, scale=scale, ratio=ratio,
        hflip=hflip, color_jitter=color_jitter, reprob=reprob, mixup=mixup, cutmix=cutmix,
        eval_every=eval_every, device=device, workers=workers,
    )  # fmt: skip
    train_set = open_set(data, train_split, limit, seed)
    val_set = open_set(val_data or data, val_split, None, seed)
    torch.manual_seed(seed)  # of the weights that are drawn: all of them, or a new head
    network = open_network(model, **opt.model_options(arch, pretrained, trust_remote_code))
    if network.num_classes != train_set.num_classes and not _asks_for_classes(model, arch):
        torch.manual_seed(seed)
        network.reset_head(train_set.num_classes)
    if to is not None:
        if swapped_sites(network.module):
            revert(network.module)
        convert(network.module, to, layers, example=network.example(2))
    recipe = recipe_of(network.module)
    trained_by = training_with(network)

    bar = columns(TextColumn("{task.fields[stats]}", table_column=Column(no_wrap=True)))
    with bar:
        task = bar.add_task("training", total=epochs, stats="")
        last: dict[str, float] = {}  # what the bar shows; a validation until the next one

        def progress(epoch: int, step: int, steps: int, stats: Mapping[str, float]) -> None:
            last.update(stats)
            at = f"epoch {epoch}/{epochs}"
            bar.update(task, completed=epoch - 1 + step / steps, stats=f"{at} {_short(last)}")
            if "top1" in stats and not err.is_terminal:
                shown = [f"{k} {stats[k]:.4g}" for k in ("lr", "train_loss", "top1") if k in stats]
                err.print("  ".join([at, *shown]), highlight=False)

        def write(network: Network, directory: Path, summary: dict[str, Any]) -> None:
            save(network, directory, trained_by=trained_by, into_existing=True)

        try:
            summary = run_training(
                network, train_set, val_set, config, output, write, progress,
                identity={"recipe": recipe.to_dict() if recipe else None},
            )  # fmt: skip
        except KeyboardInterrupt:
            raise Stopped(
                f"finished epochs are in {output}; the same command continues there."
            ) from None
    top1 = summary["top1"]
    out.print(
        f"top-1 {top1:.2f}% on {val_set.name} ({val_set.split}) after "
        f"{epochs} epoch{'s' * (epochs > 1)}, "
        f"trained with {trained_by}; written to {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _short(stats: Mapping[str, float]) -> str:
    """The statistics of a bar, in a terminal of 80 columns."""
    shown = (
        ("train_loss", "loss {:.3f}"),
        ("top1", "top1 {:.1f}"),
        ("images_per_s", "{:.0f} img/s"),
    )
    return " ".join(text.format(stats[name]) for name, text in shown if name in stats)


def _asks_for_classes(model: str, arch: str | None) -> bool:
    """Whether the name itself fixes the number of classes: the user's choice, never overruled.
    (With --arch it only says what the weights file holds.)
    """
    from mitaswap.spec import Spec

    path = model.partition(":")[2] or model  # one that exists may hold brackets
    if arch is not None or Path(model).exists() or Path(path).exists():
        return False
    return not {"num_classes", "num_labels"}.isdisjoint(Spec.parse(model).options)


def _with_options_of_fit(verb: Verb) -> Verb:
    """The decorated verb with the options of `_fit`: its name, its help, its body run by them."""
    signature = inspect.signature(_fit, eval_str=True)
    options = [each for name, each in signature.parameters.items() if name != "pretrained"]

    def command(**given: Any) -> None:
        verb(**given)

    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in options}
    return command


@app.command()
@_with_options_of_fit
def train(**options: Any) -> None:
    """Train a model from random weights, with any mechanism.

    The architecture is MODEL's, with a head for the classes of the data set. The directory holds
    the weights after the last epoch; the same command goes on where it was stopped.

    Example: `mitaswap train embedded:mita --data digits --no-aug -o runs/mita`
    """
    _fit(False, **options)


@app.command()
@_with_options_of_fit
def finetune(**options: Any) -> None:
    """Train a pretrained model further, with its own mechanism or another one.

    The head is replaced when the data set has another number of classes. The directory holds the
    weights after the last epoch; the same command goes on where it was stopped.

    Example: `mitaswap finetune embedded:mita --to linear --data digits -o runs/out`
    """
    _fit(True, **options)
